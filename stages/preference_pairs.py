"""preference-pairs: a good and a bad answer to each problem, in the Alpaca form that orpo trains on.

`origin: dataset` takes pairs that others made. `origin: base` makes them of the base model's own mistakes: it is asked as it
knows best (the few-shot prompt), and an answer in the right form with the wrong number is rejected against the source's
solution or a teacher's. So the pair differs in the arithmetic more than in the style; account.json says how far it differs in
length, which orpo could learn in place of either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.corpus import chat_format, mixing
from stages.corpus.cleaning import Cleaning
from stages.corpus.lengths import Lengths
from stages.corpus.pairing import Asking, Pair, length_bias, problems_to_ask
from stages.corpus.schemas import MathProblem
from stages.corpus.sources import Sources
from stages.corpus.teacher import Teacher, replies_to
from stages.corpus.tokenizer_files import marks_of
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json, write_rows
from stages.inference.asking import until_stop_text
from stages.inference.engine import Sampling
from stages.inference.spread import start_engine
from stages.inference.vllm_engine import Vllm
from stages.scoring.answers import equal, extract_strict, gold_text, parse_number, plain_form


class Params(Asking):
    """Where pairs are from; of `origin: base`, how it is sampled and what becomes of its answers."""

    origin: Literal["base", "dataset"]
    accepted: Literal["gold", "teacher"]  # base: the source's solution, or a teacher's answer that ends in its number
    keep: Literal["first", "most_plausible"]  # base: which wrong answer, in the order sampled or by its likelihood
    samples: int = Field(gt=0)
    temperature: float = Field(gt=0)
    engine: Literal["transformers", "vllm"]  # vllm: each answer is drawn with a seed of its own
    batch_size: int = Field(gt=0)  # answers that an engine draws side by side
    vllm: Vllm
    max_new_tokens: int = Field(gt=0)
    max_tokens: int = Field(gt=0)  # of prompt and longer answer
    max_prompt_tokens: int = Field(gt=0)
    max_answer_tokens: int = Field(gt=0)
    validation_share: float = Field(ge=0, lt=1)
    teacher: Teacher


def run(p: Params, *, raw: Path, base: Path, mix: Path, teacher: Path, out: Path, workers: int) -> None:
    """Writes out/{train,validation}.jsonl ({"id", "prompt", "chosen", "rejected"}), a template, and account.json."""
    sources, account = Sources(raw), mixing.Account()
    if p.origin == "dataset":
        pairs = made_by_others(p, sources, account, workers)
    else:
        pairs = of_own_mistakes(p, sources, account, workers, base, mix, teacher)

    marks = marks_of(base)
    template, lengths = chat_format.alpaca(marks), Lengths(base)

    def too_long(pair: Pair) -> bool:
        start = chat_format.render(template, pair.question)
        ends = [f"{answer}{marks.text_end}" for answer in (pair.chosen, pair.rejected)]
        return (
            lengths.over(start, p.max_prompt_tokens)
            or any(lengths.over(end, p.max_answer_tokens) for end in ends)
            or any(lengths.over(start + end, p.max_tokens) for end in ends)
        )

    pairs = account.keep("pairs", pairs, alike=lambda pair: pair.chosen == pair.rejected, too_long=too_long)
    train, validation = mixing.held_out(pairs, p.validation_share)
    if not train or not validation:
        raise InputError("data/pairs would be empty: raise preference_pairs.questions, samples, temperature or max_tokens, "
                         "or name a larger data set")  # fmt: skip
    account.used("pairs", train=len(train), validation=len(validation))
    counted = {side: [lengths.count(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")}
    account.used("pairs", lengths=length_bias(**counted))
    for part, rows in (("train", train), ("validation", validation)):
        write_rows(out / f"{part}.jsonl", (_row(pair, template) for pair in rows))
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(out / "account.json", account.as_json())


def made_by_others(p: Params, sources: Sources, account: mixing.Account, workers: int) -> list[Pair]:
    """The pairs of the source `preferences`, cleaned, in an order that the seed decides."""
    cleaning = Cleaning(p.clean, sources.test_questions(), account, workers)
    rows = cleaning.keep("preferences", sources.preferences("preferences"))
    pairs = [Pair(row.id, row.question, row.accepted, row.rejected) for row in rows]
    return mixing.shuffled(pairs, p.seed, "preference pairs")


@dataclass(frozen=True)
class Sample:
    """One answer that the base gave to a problem."""

    problem: MathProblem
    prompt: str
    text: str

    @property
    def id(self) -> str:
        return self.problem.id

    @property
    def asked(self) -> str:
        return self.text


def of_own_mistakes(
    p: Params, sources: Sources, account: mixing.Account, workers: int, base: Path, mix: Path, teacher: Path
) -> list[Pair]:
    """For each problem that the base gets wrong, an accepted answer and a wrong one of its own."""
    problems = problems_to_ask(p, sources, account, workers)
    accepted = (
        _taught(p, problems, account, teacher)
        if p.accepted == "teacher"
        else {each.id: _gold(each) for each in problems}
    )
    problems = [problem for problem in problems if problem.id in accepted]

    engine = start_engine(p.engine, base, p.batch_size, p.vllm)
    template = (mix / "prompts" / "few_shot.jinja").read_text(encoding="utf-8")
    asked = [
        (problem, chat_format.render(template, problem.question)) for problem in problems for _ in range(p.samples)
    ]
    completions = engine.generate([prompt for _, prompt in asked], Sampling(p.max_new_tokens, p.temperature, p.seed))
    measures.note(tokens=sum(completion.tokens for completion in completions))
    wrong = account.keep(
        "sampled answers",
        [
            Sample(problem, prompt, until_stop_text(completion, "few_shot").text.strip())
            for (problem, prompt), completion in zip(asked, completions, strict=True)
        ],
        no_number_declared=lambda sample: parse_number(extract_strict(sample.text) or "") is None,
        right=lambda sample: _is_right(sample.text, sample.problem),
    )
    rejected = most_plausible(engine, wrong) if p.keep == "most_plausible" else first_of_each(wrong)
    return [Pair(sample.id, sample.problem.question, accepted[sample.id], sample.text) for sample in rejected]


def first_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """The first answer to each problem."""
    return [next(group) for _, group in groupby(samples, key=lambda sample: sample.id)]


def most_plausible(engine, samples: Sequence[Sample]) -> list[Sample]:
    """Of the answers to each problem, the one whose tokens the engine's model gives the highest mean log-probability."""
    likelihoods = engine.mean_log_probabilities([(sample.prompt, f" {sample.text}") for sample in samples])
    rated = zip(samples, likelihoods, strict=True)
    return [max(group, key=itemgetter(1))[0] for _, group in groupby(rated, key=lambda each: each[0].id)]


def _taught(p: Params, problems: list[MathProblem], account: mixing.Account, folder: Path) -> dict[str, str]:
    """The teacher's answers that end in the right number, by problem."""
    replies = replies_to(problems, p.teacher, folder)
    kept = account.keep(
        "teacher's answers",
        [Sample(problem, "", replies[problem.id]["text"].strip()) for problem in problems],
        cut_off=lambda sample: replies[sample.id]["finish_reason"] == "length",
        no_number_declared=lambda sample: parse_number(extract_strict(sample.text) or "") is None,
        wrong=lambda sample: not _is_right(sample.text, sample.problem),
    )
    return {sample.id: sample.text for sample in kept}


def _is_right(text: str, problem: MathProblem) -> bool:
    return equal(extract_strict(text), parse_number(problem.answer))


def _gold(problem: MathProblem) -> str:
    return chat_format.gsm8k_answer(problem.working, plain_form(gold_text(problem.answer)))


def _row(pair: Pair, template: str) -> dict[str, Any]:
    return {
        "id": pair.id,
        "prompt": chat_format.render(template, pair.question),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }
