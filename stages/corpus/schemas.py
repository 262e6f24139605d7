"""The row forms that sources come in, and the few forms that everything after fetch works with.

| schema | fields | source in the report |
| --- | --- | --- |
| gsm8k | question, answer | GSM8K |
| openmathreasoning | problem, generated_solution, expected_answer | unsloth/OpenMathReasoning-mini |
| dapo | prompt, solution | open-r1/DAPO-Math-17k-Processed |
| sharegpt | conversations (from, value; or role, content) | mlabonne/FineTome-100k |
| preferences | prompt, accepted, rejected | blesspearl/orpo-optimized-math-qa |
| documents | prompt (may be empty), completion | none: what the embedded base model reads |

Reading never fails on a row: one that lacks what its schema needs comes out as Unusable, with the reason, to be counted.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]

FIELDS: dict[str, dict[str, type]] = {
    "gsm8k": {"question": str, "answer": str},
    "openmathreasoning": {"problem": str, "generated_solution": str, "expected_answer": str},
    "dapo": {"prompt": str, "solution": str},
    "sharegpt": {"conversations": list},
    "preferences": {"prompt": str, "accepted": str, "rejected": str},
    "documents": {"completion": str},
}
Schema = Literal["gsm8k", "openmathreasoning", "dapo", "sharegpt", "preferences", "documents"]
PROBLEM_SCHEMAS = ("gsm8k", "openmathreasoning", "dapo")
TYPE_NAMES = {str: "text", list: "list"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Unusable:
    """A row that lacks what its schema needs."""

    id: str
    reason: str
    asked: str = ""  # nothing of it can be shown


@dataclass(frozen=True)
class MathProblem:
    """A problem whatever source it came from; `solution` is the source's own text, final answer included."""

    id: str
    question: str
    working: str  # "" where the source has none
    solution: str
    answer: str  # as the source writes it: may carry commas, units, or be no number
    about: Row  # family and steps, where the source says them

    @property
    def asked(self) -> str:
        return self.question

    @property
    def said(self) -> str:
        """All of its text."""
        return f"{self.question}\n{self.solution}"


@dataclass(frozen=True)
class Conversation:
    """A chat; each message is {"role", "content"}."""

    id: str
    messages: list[dict[str, str]]

    @property
    def asked(self) -> str:
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def said(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Preference:
    """A question with a good and a bad answer."""

    id: str
    question: str
    accepted: str
    rejected: str

    @property
    def asked(self) -> str:
        return self.question

    @property
    def said(self) -> str:
        return f"{self.question}\n{self.accepted}"


@dataclass(frozen=True)
class Document:
    """A text for pretraining."""

    id: str
    prompt: str
    completion: str


def read_row(
    row: Mapping[str, Any], schema: Schema, id: str
) -> MathProblem | Conversation | Preference | Document | Unusable:
    """A source's row in the form that its schema stands for; `id` where it has none of its own."""
    own = row.get("id")
    id = own if isinstance(own, str) and own and is_unicode(own) else id
    for field, kind in FIELDS[schema].items():
        value = row.get(field)
        if value is None:
            return Unusable(id, f"no {field}")
        if not isinstance(value, kind):
            return Unusable(id, f"{field} is no {TYPE_NAMES[kind]}")
        if not value or kind is str and not value.strip():
            return Unusable(id, f"{field} is empty")
        if kind is str and not is_unicode(value):
            return Unusable(id, f"{field} is not Unicode")
    return _READERS[schema](row, id)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can bring halves of characters, which cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def turn_fault(messages: list[dict[str, str]]) -> str | None:
    """What is wrong with the order of a chat: a system message may come first, then user and assistant take turns."""
    if any(not message["content"].strip() for message in messages):
        return "empty turn"
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[0] == "system" else turns
    in_order = turns and len(turns) % 2 == 0 and turns == ["user", "assistant"] * (len(turns) // 2)
    return None if in_order else "turns out of order"


def without_final_box(solution: str) -> str:
    r"""A solution's working: its text up to the line that carries the last `\boxed{...}`, or all of it."""
    before, mark, _ = solution.rpartition("\\boxed")
    return (before.rpartition("\n")[0] or before).strip() if mark else solution.strip()


def _gsm8k(row: Mapping[str, Any], id: str) -> MathProblem | Unusable:
    solution = CALCULATOR_MARK.sub("", row["answer"])
    working, mark, answer = solution.rpartition("####")
    if not mark:
        return Unusable(id, "answer has no #### line")
    return MathProblem(id, row["question"], working.strip(), solution, answer.strip(), _about(row))


def _openmathreasoning(row: Mapping[str, Any], id: str) -> MathProblem:
    solution = row["generated_solution"]
    return MathProblem(id, row["problem"], without_final_box(solution), solution, row["expected_answer"], _about(row))


def _dapo(row: Mapping[str, Any], id: str) -> MathProblem:
    return MathProblem(id, row["prompt"], "", row["solution"], row["solution"], _about(row))


def _sharegpt(row: Mapping[str, Any], id: str) -> Conversation | Unusable:
    messages = []
    for turn in row["conversations"]:
        if not isinstance(turn, dict):
            return Unusable(id, "a turn is no object")
        sender, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(sender, str) or sender not in ROLES:
            return Unusable(id, "a turn is from nobody known")
        if not isinstance(text, str):
            return Unusable(id, "a turn is no text")
        if not is_unicode(text):
            return Unusable(id, "a turn is not Unicode")
        messages.append({"role": ROLES[sender], "content": text})
    return Conversation(id, messages)


def _preferences(row: Mapping[str, Any], id: str) -> Preference:
    return Preference(id, row["prompt"], row["accepted"], row["rejected"])


def _documents(row: Mapping[str, Any], id: str) -> Document | Unusable:
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str) or not is_unicode(prompt):
        return Unusable(id, "prompt is no text")
    return Document(id, prompt, row["completion"])


def _about(row: Mapping[str, Any]) -> Row:
    """What a problem's source says of it besides, in types that JSON keeps."""
    kinds = {"family": str, "steps": int}
    return {
        name: row[name] for name, kind in kinds.items() if type(row.get(name)) is kind and is_unicode(str(row[name]))
    }


_READERS: dict[str, Callable] = {
    "gsm8k": _gsm8k,
    "openmathreasoning": _openmathreasoning,
    "dapo": _dapo,
    "sharegpt": _sharegpt,
    "preferences": _preferences,
    "documents": _documents,
}
