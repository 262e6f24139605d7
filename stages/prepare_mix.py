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
from stages.corpus.schemas import MathProblem
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.harness.params import StageParams
from stages.scoring.answers import gold_answer, gold_text, parse_number

Row = dict[str, Any]


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
    sources, account = Sources(raw), mixing.Account()
    test = list(_test_rows(sources))
    asked_in_test = {fingerprint(row["question"]) for row in test}

    def clean(name: str) -> list[MathProblem]:
        """A source's problems without those that the test asks."""
        seen = {"asked_in_the_test": lambda problem: asked_in(problem.question, asked_in_test)}
        return account.keep(name, sources.problems(name), **seen)

    def with_number(name: str, problems: list[MathProblem]) -> list[MathProblem]:
        """Problems whose answer a reward can check."""
        no_number = {"answer_is_no_number": lambda problem: parse_number(problem.answer) is None}
        return account.keep(f"{name}, with a number as answer", problems, **no_number)

    reasoning = clean("reasoning")
    numeric = with_number("reasoning", reasoning)
    chats = mixing.shuffled(sources.conversations("chat"), p.seed, "chats")
    train = {
        "qlora": sum(mixing.with_share([_supervised(problem) for problem in reasoning], chats, p.chat_share), []),
        "sft": [_tagged(problem) for problem in mixing.shuffled(numeric, p.seed, "sft")[: p.sft_rows]],
        "grpo": [_asked(problem) for problem in mixing.shuffled(numeric, p.seed, "grpo")[: p.grpo_reasoning_rows]],
    }
    train["grpo"] += [_asked(problem) for problem in with_number("rl", clean("rl"))] if "rl" in sources else []
    validation: dict[str, list[Row]] = {}
    if "validation" in sources:
        held = clean("validation")
        numeric = with_number("validation", held)
        validation = {
            "qlora": [_supervised(problem) for problem in held],
            "sft": [_tagged(problem) for problem in numeric],
            "grpo": [_asked(problem) for problem in numeric],
        }

    tagged = chat_format.chatml(p.system_prompt)
    templates = {"qlora": chat_format.chatml(), "sft": tagged, "grpo": tagged}
    lengths = Lengths(tokenizer)
    for name, rows in train.items():
        too_long = {"too_long": lengths.over(p.max_tokens, templates[name])}
        rows = account.keep(name, mixing.shuffled(rows, p.seed, name), **too_long)
        if name in validation:
            held = account.keep(f"{name}, validation", validation[name], **too_long)
        else:
            rows, held = mixing.held_out(rows, p.validation_share)
        account.used(name, train=len(rows), validation=len(held))
        _write_set(out / name, templates[name], {"train": rows, "validation": held})

    write_rows(out / "test.jsonl", test)
    _write_prompts(out / "prompts", reasoning[: p.few_shot_examples])
    account.used("test", rows=len(test))
    write_json(out / "account.json", account.as_json())
    measures.note(rows=sum(counts.get("train", 0) for counts in account.counts.values()))


class Sources:
    """What fetch brought: data/raw/<source>/rows.jsonl in the schema that sources.json names."""

    def __init__(self, raw: Path) -> None:
        self.raw, self.about = raw, read_json(raw / "sources.json")

    def __contains__(self, name: str) -> bool:
        return name in self.about

    def path(self, name: str) -> Path:
        """A source's rows; InputError where the profile has none by that name."""
        if name not in self:
            raise InputError(f"params.yaml: fetch.sources.{name} is none, and prepare-mix needs it: give it another kind")
        return self.raw / name / "rows.jsonl"

    def problems(self, name: str) -> Iterable[MathProblem]:
        """A source's mathematics problems."""
        return schemas.problems(self.path(name), self.about[name]["schema"])

    def conversations(self, name: str) -> list[Row]:
        """A source's chats; none where the profile has no such source."""
        return list(schemas.conversations(self.path(name))) if name in self else []


class Lengths:
    """Counts a row's tokens as its training stage will see them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def over(self, most: int, template: str) -> Callable[[Row], bool]:
        """A test of whether a row takes more than `most` tokens under a template."""

        def is_over(row: Row) -> bool:
            text = self.tokenizer.apply_chat_template(
                row.get("messages") or row["prompt"],
                chat_template=template,
                tokenize=False,
                add_generation_prompt="prompt" in row,
            )
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) > most

        return is_over


def _test_rows(sources: Sources) -> Iterable[Row]:
    """GSM8K rows as they are, each with an id and its number of steps; a gold answer must be a number."""
    path = sources.path("test")
    if (schema := sources.about["test"]["schema"]) != "gsm8k":
        raise InputError(f"{path}: the test source must have schema gsm8k, found {schema}")
    for number, row in enumerate(read_rows(path)):
        try:
            gold_answer(row["answer"])
        except InputError as error:
            raise InputError(f"{path}, row {number + 1}: {error}") from None
        steps = row.get("steps", row["answer"].count("<<"))
        yield {"id": f"test-{number:06d}", **row, "steps": steps}


def _supervised(problem: MathProblem) -> Row:
    """The source's own solution as the reply."""
    return _answered(problem, problem.solution)


def _tagged(problem: MathProblem) -> Row:
    """The solution in the tagged answer form as the reply."""
    return _answered(problem, chat_format.tagged_answer(problem.working, gold_text(problem.answer)))


def _answered(problem: MathProblem, reply: str) -> Row:
    asked = [{"role": "user", "content": problem.question}]
    return {"id": problem.id, "messages": [*asked, {"role": "assistant", "content": reply}], **problem.about}


def _asked(problem: MathProblem) -> Row:
    """The question alone, and the answer that rewards are held to."""
    prompt = [{"role": "user", "content": problem.question}]
    return {"id": problem.id, "prompt": prompt, "answer": gold_text(problem.answer), **problem.about}


def _write_set(folder: Path, template: str, parts: dict[str, list[Row]]) -> None:
    for part, rows in parts.items():
        if not rows:
            raise InputError(f"data/mix/{folder.name}/{part}.jsonl would be empty: fetch more rows, or raise "
                             "prepare_mix.max_tokens or prepare_mix.validation_share")  # fmt: skip
        write_rows(folder / f"{part}.jsonl", rows)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_prompts(folder: Path, examples: Sequence[MathProblem]) -> None:
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
