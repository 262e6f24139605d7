"""prepare-mix: turns raw sources into the training sets of qlora, sft and grpo, and the test set of everything.

qlora reads every reasoning row and chat rows to a share of the total, as plain ChatML. sft and grpo read problems with a
system message that asks for the tagged answer form. Whatever is found wrong with a row is counted in account.json, with
examples, and dropped where the parameters say so.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.corpus import chat_format, mixing
from stages.corpus.cleaning import Checks, Cleaning
from stages.corpus.fitting import Fit, Fitting, Messages
from stages.corpus.lengths import Lengths
from stages.corpus.marks import Marks
from stages.corpus.schemas import Conversation, MathProblem
from stages.corpus.sources import Sources
from stages.corpus.tokenizer_files import marks_of
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json, write_rows
from stages.harness.params import StageParams
from stages.harness.workers import in_order
from stages.scoring.answers import gold_answer, gold_text, parse_number, plain_form

Row = dict[str, Any]


class Params(StageParams):
    """What goes into each set; a source's name is a key of fetch.sources."""

    seed: int
    chat_share: float = Field(ge=0, lt=1)  # of qlora's rows
    validation_share: float = Field(ge=0, lt=1)  # held out where there is no source named `validation`
    clean: Checks
    max_tokens: int = Field(gt=0)  # of a row as it is trained on
    too_long: Literal["drop", "cut", "keep"]  # what becomes of a longer row of qlora; cut rows still stop
    system_prompt: str  # asks for the tagged answer form; part of sft's and grpo's template
    sft_rows: int | None = Field(gt=0)  # to train on; null: all
    grpo_reasoning_rows: int | None = Field(ge=0)  # the rest of grpo's prompts come from the source `rl`
    few_shot_examples: int = Field(ge=0)  # shown before the question; 0 asks in the same words without any


def run(p: Params, *, raw: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """Writes out/{qlora,sft,grpo}/{train,validation}.jsonl with a template each, test.jsonl, prompts/, account.json."""
    sources, account = Sources(raw), mixing.Account()
    test = [_test_row(number, row) for number, (row, _) in enumerate(sources.test())]
    cleaning = Cleaning(p.clean, {row["id"]: row["question"] for row in test}, account, workers)

    reasoning = cleaning.keep("reasoning", sources.problems("reasoning"))
    chats = sources.conversations("chat").shuffled(p.seed, "chats") if "chat" in sources else []
    chats = cleaning.keep("chat", chats, most=mixing.added_rows(len(reasoning), p.chat_share))
    rl = cleaning.keep("rl", sources.problems("rl")) if "rl" in sources else []

    numeric = _with_number(account, "reasoning", reasoning)
    prompts = [*mixing.shuffled(numeric, p.seed, "grpo")[: p.grpo_reasoning_rows], *_with_number(account, "rl", rl)]
    forms = Forms(p, tokenizer, account, workers)
    held_too = 1 if "validation" in sources else 1 - p.validation_share
    train = {
        "qlora": forms.qlora("qlora", [*reasoning, *chats]),
        "sft": forms.sft(
            "sft", mixing.shuffled(numeric, p.seed, "sft"), p.sft_rows and math.ceil(p.sft_rows / held_too)
        ),
        "grpo": forms.grpo("grpo", prompts),
    }
    validation: dict[str, list[Row]] = {}
    if "validation" in sources:
        held = cleaning.keep("validation", sources.problems("validation"))
        numeric = _with_number(account, "validation", held)
        validation = {
            "qlora": forms.qlora("qlora, validation", held),
            "sft": forms.sft("sft, validation", numeric),
            "grpo": forms.grpo("grpo, validation", numeric),
        }

    for name, rows in train.items():
        rows = mixing.shuffled(rows, p.seed, name)
        rows, held = (rows, validation[name]) if validation else mixing.held_out(rows, p.validation_share)
        account.used(name, train=len(rows), validation=len(held))
        _write_set(out / name, forms.templates[name], {"train": rows, "validation": held})
    write_rows(out / "test.jsonl", test)
    _write_prompts(out / "prompts", reasoning[: p.few_shot_examples], forms.marks)
    account.used("test", rows=len(test))
    write_json(out / "account.json", account.as_json())
    measures.note(rows=sum(entry.get("train", 0) for entry in account.entries.values()))


@dataclass(frozen=True)
class Example:
    """A row in the form that it is trained on, and how that fits."""

    source: MathProblem | Conversation
    fit: Fit

    @property
    def id(self) -> str:
        return self.source.id

    @property
    def asked(self) -> str:
        return self.source.asked


class Forms:
    """The form in which each method reads its rows; what does not fit into `max_tokens` in that form is left out."""

    def __init__(self, p: Params, tokenizer: Path, account: mixing.Account, workers: int) -> None:
        self.marks = marks_of(tokenizer)
        tagged = chat_format.chatml(p.system_prompt, self.marks)
        self.templates = {"qlora": chat_format.chatml(marks=self.marks), "sft": tagged, "grpo": tagged}
        lengths = Lengths(tokenizer)
        self.fitting = {name: Fitting(lengths, template, p.max_tokens) for name, template in self.templates.items()}
        self.too_long, self.account, self.workers = p.too_long, account, workers

    def qlora(self, what: str, sources: Sequence[MathProblem | Conversation]) -> list[Row]:
        """Chats as they are, and problems with the source's own solution as the reply."""
        fitting = self.fitting["qlora"]
        fit = {"drop": fitting.whole, "cut": fitting.sure, "keep": fitting.fit}[self.too_long]
        fits = in_order(lambda source: fit(_messages(source)), sources, self.workers)
        examples = self.account.keep(
            what,
            (Example(source, fit) for source, fit in fits),
            only_counted={
                "drop": (),
                "cut": ("too_long",),
                "keep": ("too_long", "no_room_for_a_reply", "cut_before_its_answer"),
            }[self.too_long],
            too_long=lambda example: example.fit.too_long,
            no_room_for_a_reply=lambda example: example.fit.too_long and example.fit.cut is None,
            cut_before_its_answer=lambda example: isinstance(example.source, MathProblem) and example.fit.loses_answer,
        )
        cuts = self.too_long == "cut"
        return [
            _row(example.source, messages=cuts and example.fit.cut or _messages(example.source)) for example in examples
        ]

    def sft(self, what: str, problems: Sequence[MathProblem], most: int | None = None) -> list[Row]:
        """Problems with their solution in the tagged form: the first `most` that fit whole, for the answer stands last."""
        kept = self._that_fit(what, "sft", problems, lambda problem: _messages(problem, _tagged(problem)), most)
        return [_row(problem, messages=_messages(problem, _tagged(problem))) for problem in kept]

    def grpo(self, what: str, problems: Sequence[MathProblem]) -> list[Row]:
        """The question alone, and the answer that rewards are held to; trainers do not cut prompts, so each must fit."""
        kept = self._that_fit(what, "grpo", problems, lambda problem: _messages(problem)[:1])
        return [_row(problem, prompt=_messages(problem)[:1], answer=_gold(problem)) for problem in kept]

    def _that_fit(
        self,
        what: str,
        name: str,
        problems: Sequence[MathProblem],
        messages: Callable[[MathProblem], Messages],
        most: int | None = None,
    ) -> list[MathProblem]:
        """The first `most` problems whose messages fit whole."""
        fits = in_order(lambda problem: self.fitting[name].whole(messages(problem)), problems, self.workers)
        examples = (Example(problem, fit) for problem, fit in fits)
        too_long = {"too_long": lambda example: example.fit.too_long}
        return [example.source for example in self.account.keep(what, examples, most=most, **too_long)]


def _row(source: MathProblem | Conversation, **fields: Any) -> Row:
    return {"id": source.id, **fields, **(source.about if isinstance(source, MathProblem) else {})}


def _messages(source: MathProblem | Conversation, reply: str | None = None) -> Messages:
    if isinstance(source, Conversation):
        return source.messages
    return [{"role": "user", "content": source.question}, {"role": "assistant", "content": reply or source.solution}]


def _tagged(problem: MathProblem) -> str:
    return chat_format.tagged_answer(problem.working, _gold(problem))


def _gold(problem: MathProblem) -> str:
    """The answer as a number is mostly written: 1000, where a source has 1,000 or $1,000."""
    return plain_form(gold_text(problem.answer))


def _with_number(account: mixing.Account, source: str, problems: Iterable[MathProblem]) -> list[MathProblem]:
    """Problems whose answer a reward can check."""
    no_number = {"answer_is_no_number": lambda problem: parse_number(problem.answer) is None}
    return account.keep(f"{source}, with a number as answer", problems, **no_number)


def _test_row(number: int, row: Row) -> Row:
    """A GSM8K row as it is, with an id and its number of steps; a gold answer must be a number."""
    try:
        gold_answer(row["answer"])
    except InputError as error:
        raise InputError(f"the test source, row {number + 1}: {error}") from None
    return {"id": f"test-{number:06d}", **row, "steps": row.get("steps", row["answer"].count("<<"))}


def _write_set(folder: Path, template: str, parts: dict[str, list[Row]]) -> None:
    for part, rows in parts.items():
        if not rows:
            raise InputError(f"data/mix/{folder.name}/{part}.jsonl would be empty: fetch more rows, or raise "
                             "prepare_mix.max_tokens or prepare_mix.validation_share")  # fmt: skip
        write_rows(folder / f"{part}.jsonl", rows)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_prompts(folder: Path, examples: Sequence[MathProblem], marks: Marks) -> None:
    """The ways in which a base model is asked (eval.base_prompts chooses); examples are training problems."""
    shown = [(e.question, chat_format.gsm8k_answer(e.working, _gold(e))) for e in examples]
    prompts = {
        "chatml": chat_format.chatml(marks=marks),
        "alpaca": chat_format.alpaca(marks),
        "few_shot": chat_format.few_shot(shown, marks),
    }
    folder.mkdir(parents=True)
    for name, template in prompts.items():
        (folder / f"{name}.jinja").write_text(template, encoding="utf-8")
