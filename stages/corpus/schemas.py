"""The row forms that sources come in, and the one form that everything after fetch works with.

| schema | fields | source in the report |
| --- | --- | --- |
| gsm8k | question, answer | GSM8K |
| openmathreasoning | problem, generated_solution, expected_answer | unsloth/OpenMathReasoning-mini |
| dapo | prompt, solution | open-r1/DAPO-Math-17k-Processed |
| sharegpt | conversations (from, value) | mlabonne/FineTome-100k |
| preferences | prompt, accepted, rejected | blesspearl/orpo-optimized-math-qa |
| documents | prompt (may be empty), completion | none: what the embedded base model reads |
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows

FIELDS = {
    "gsm8k": {"question": str, "answer": str},
    "openmathreasoning": {"problem": str, "generated_solution": str, "expected_answer": str},
    "dapo": {"prompt": str, "solution": str},
    "sharegpt": {"conversations": list},
    "preferences": {"prompt": str, "accepted": str, "rejected": str},
    "documents": {"completion": str},
}
Schema = Literal["gsm8k", "openmathreasoning", "dapo", "sharegpt", "preferences", "documents"]
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class MathProblem:
    """A problem whatever source it came from; `solution` is the source's own text, final answer included."""

    id: str
    question: str
    working: str  # "" where the source has none
    solution: str
    answer: str  # as the source writes it: may carry commas, units, or be no number
    about: dict[str, Any]  # family and steps, where the source says them


def check_rows(path: Path, schema: Schema) -> int:
    """Counts the rows of a raw file; InputError names file and line of a row without a needed field."""
    count = 0
    for count, row in enumerate(read_rows(path), 1):
        for field, kind in FIELDS[schema].items():
            if not isinstance(row.get(field), kind) or not row[field]:
                raise InputError(f"{path}, row {count}: no {field!r}, which schema {schema} needs: mend or remove the row")
    if count == 0:
        raise InputError(f"{path} holds no rows: give a file with at least one")
    return count


def problems(path: Path, schema: Schema) -> Iterable[MathProblem]:
    """The problems of a raw file of schema gsm8k, openmathreasoning or dapo; rows without an id get their number."""
    for number, row in enumerate(read_rows(path)):
        match schema:
            case "gsm8k":
                solution = CALCULATOR_MARK.sub("", row["answer"])
                working, mark, answer = solution.rpartition("####")
                if not mark:
                    raise InputError(f"{path}, row {number + 1}: the answer has no `#### N` line: mend or remove the row")
                question, working, answer = row["question"], working.strip(), answer.strip()
            case "openmathreasoning":
                question, solution, answer = row["problem"], row["generated_solution"], row["expected_answer"]
                working = without_final_box(solution)
            case "dapo":
                question, solution, answer, working = row["prompt"], row["solution"], row["solution"], ""
            case _:
                raise InputError(f"{path}: a source of schema {schema} holds no problems: use another source here")
        about = {name: row[name] for name in ("family", "steps") if name in row}
        yield MathProblem(row.get("id", f"{path.parent.name}-{number:06d}"), question, working, solution, answer, about)


def without_final_box(solution: str) -> str:
    r"""A solution's working: its text up to the line that carries the last `\boxed{...}`, or all of it."""
    before, mark, _ = solution.rpartition("\\boxed")
    return (before.rpartition("\n")[0] or before).strip() if mark else solution.strip()


def conversations(path: Path) -> Iterable[dict[str, Any]]:
    """The chats of a ShareGPT file as {"id", "messages"}; InputError names a turn from nobody known."""
    for number, row in enumerate(read_rows(path)):
        try:
            messages = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}, row {number + 1}: a turn has no known sender or no value ({error})") from None
        yield {"id": row.get("id", f"{path.parent.name}-{number:06d}"), "messages": messages}
