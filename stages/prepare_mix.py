"""prepare-mix: turns raw sources into the training sets of qlora, sft and grpo, and the test set of everything.

qlora reads every reasoning row and chat rows to a share of the total, as plain ChatML. sft and grpo read problems with a
system message that asks for the tagged answer form. What is dropped is counted, with the reason, in account.json.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.corpus import chat_format, mixing, schemas
from stages.corpus.decontamination import asked_in, fingerprint
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.harness.params import StageParams
from stages.scoring.answers import gold_answer, gold_text, parse_number


class Params(StageParams):
    """What goes into each set; a source's name is a key of fetch.sources."""

    seed: int
    chat_share: float = Field(ge=0, lt=1)  # of qlora's rows
    validation_share: float = Field(ge=0, lt=1)  # held out where there is no source named `validation`
    max_tokens: int = Field(gt=0)  # longer rows are dropped and counted
    system_prompt: str  # asks for the tagged answer form; part of sft's and grpo's template
    sft_rows: int | None = Field(gt=0)  # null: all
    grpo_reasoning_rows: int | None = Field(ge=0)  # the rest of grpo's prompts come from the source `rl`
    few_shot_examples: int = Field(ge=0)  # shown before the question; 0 asks in the same words without any


def run(p: Params, *, raw: Path, tokenizer: Path, out: Path) -> None:
    """Writes out/{qlora,sft,grpo}/{train,validation}.jsonl with a template each, test.jsonl, prompts/, account.json."""
    sources = read_json(raw / "sources.json")
    account = mixing.Account()
    templates = {"qlora": chat_format.chatml(), "sft": chat_format.chatml(p.system_prompt)}
    templates["grpo"] = templates["sft"]
    length = Lengths(tokenizer)

    test = list(_test_rows(_source(raw, sources, "test"), sources["test"]["schema"]))
    write_rows(out / "test.jsonl", test)
    asked_in_test = {fingerprint(row["question"]) for row in test}

    def clean(name: str) -> list[schemas.MathProblem]:
        problems = schemas.problems(_source(raw, sources, name), sources[name]["schema"])
        return account.keep(name, problems, asked_in_the_test=lambda problem: asked_in(problem.question, asked_in_test))

    def with_number(name: str, problems: list[schemas.MathProblem]) -> list[schemas.MathProblem]:
        no_number = {"answer_is_no_number": lambda problem: parse_number(problem.answer) is None}
        return account.keep(f"{name}, with a number as answer", problems, **no_number)

    reasoning = clean("reasoning")
    validation = clean("validation") if "validation" in sources else None
    numeric = {name: with_number(name, found) for name, found in
               {"reasoning": reasoning, "validation": validation, "rl": clean("rl") if "rl" in sources else []}.items()
               if found is not None}  # fmt: skip
    chats = list(schemas.conversations(_source(raw, sources, "chat"))) if "chat" in sources else []

    supervised = [_supervised(problem, problem.solution) for problem in reasoning]
    some_chats = mixing.shuffled(chats, p.seed, "chats")
    rows_of = {
        "qlora": sum(mixing.with_share(supervised, some_chats, p.chat_share), []),
        "sft": [_tagged(problem) for problem in mixing.shuffled(numeric["reasoning"], p.seed, "sft")][: p.sft_rows],
        "grpo": [_asked(problem) for problem in mixing.shuffled(numeric["reasoning"], p.seed, "grpo")]
        [: p.grpo_reasoning_rows] + [_asked(problem) for problem in numeric["rl"]],
    }  # fmt: skip
    held_of = {} if validation is None else {
        "qlora": [_supervised(problem, problem.solution) for problem in validation],
        "sft": [_tagged(problem) for problem in numeric["validation"]],
        "grpo": [_asked(problem) for problem in numeric["validation"]],
    }  # fmt: skip

    for name, rows in rows_of.items():
        fits = length.limit(templates[name], p.max_tokens)
        rows = account.keep(name, mixing.shuffled(rows, p.seed, name), too_long=lambda row: not fits(row))
        if name in held_of:
            train = rows
            held = account.keep(f"{name}, validation", held_of[name], too_long=lambda row: not fits(row))
        else:
            train, held = mixing.held_out(rows, p.validation_share)
        account.used(name, train=len(train), validation=len(held))
        for part, part_rows in (("train", train), ("validation", held)):
            if not part_rows:
                raise InputError(f"data/mix/{name}/{part}.jsonl would be empty: fetch more rows, or raise "
                                 "prepare_mix.max_tokens or prepare_mix.validation_share")  # fmt: skip
            write_rows(out / name / f"{part}.jsonl", part_rows)
        (out / name / "chat_template.jinja").write_text(templates[name], encoding="utf-8")

    _write_prompts(out / "prompts", reasoning[: p.few_shot_examples])
    account.used("test", rows=len(test))
    write_json(out / "account.json", account.as_json())
    measures.note(rows=sum(counts.get("train", 0) for counts in account.counts.values()))


class Lengths:
    """Counts a row's tokens as its training stage will see them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def limit(self, template: str, most: int) -> Callable[[dict[str, Any]], bool]:
        """A test of whether a row fits into `most` tokens under a template."""

        def fits(row: dict[str, Any]) -> bool:
            messages = row.get("messages") or row["prompt"]
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt="prompt" in row
            )
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) <= most

        return fits


def _source(raw: Path, sources: dict[str, Any], name: str) -> Path:
    if name not in sources:
        raise InputError(f"params.yaml: fetch.sources.{name} is none, and prepare-mix needs it: give it another kind")
    return raw / name / "rows.jsonl"


def _test_rows(path: Path, schema: str) -> Iterable[dict[str, Any]]:
    """GSM8K rows as they are, each with an id and its number of steps; a gold answer must be a number."""
    if schema != "gsm8k":
        raise InputError(f"{path}: the test source must have schema gsm8k, found {schema}")
    for number, row in enumerate(read_rows(path)):
        try:
            gold_answer(row["answer"])
        except InputError as error:
            raise InputError(f"{path}, row {number + 1}: {error}") from None
        steps = row.get("steps", row["answer"].count("<<"))
        yield {"id": f"test-{number:06d}", **row, "steps": steps}


def _supervised(problem: schemas.MathProblem, reply: str) -> dict[str, Any]:
    asked = [{"role": "user", "content": problem.question}]
    return {"id": problem.id, "messages": [*asked, {"role": "assistant", "content": reply}], **problem.about}


def _tagged(problem: schemas.MathProblem) -> dict[str, Any]:
    return _supervised(problem, chat_format.tagged_answer(problem.working, gold_text(problem.answer)))


def _asked(problem: schemas.MathProblem) -> dict[str, Any]:
    prompt = [{"role": "user", "content": problem.question}]
    return {"id": problem.id, "prompt": prompt, "answer": gold_text(problem.answer), **problem.about}


def _write_prompts(folder: Path, examples: Sequence[schemas.MathProblem]) -> None:
    """The ways in which a base model is asked (eval.base_prompts chooses); examples are training problems."""
    shown = [(e.question, chat_format.gsm8k_answer(e.working, gold_text(e.answer))) for e in examples]
    prompts = {
        "chatml": chat_format.chatml(),
        "alpaca": chat_format.alpaca(),
        "few_shot": chat_format.few_shot(shown),
    }
    folder.mkdir(parents=True)
    for name, template in prompts.items():
        (folder / f"{name}.jinja").write_text(template, encoding="utf-8")
