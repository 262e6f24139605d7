"""eval: one model's greedy answers to the whole test set, and their scores.

A model that carries a chat template is asked with it. The base carries none: it is asked in every way that
`base_prompts` names, and the way that scores best is its score, so that no method beats a base that was asked badly.
With `n_samples` above 1 each question is also answered so many times at a temperature, for pass@k and maj@k.
"""

import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows, write_json, write_rows
from stages.harness.params import StageParams
from stages.inference.asking import ask
from stages.inference.engine import Engine, Sampling
from stages.inference.spread import start_engine
from stages.inference.vllm_engine import Vllm
from stages.scoring import bleu
from stages.scoring.answers import gold_answer, parse_number
from stages.scoring.samples import majority_at_k, pass_at_k, powers_of_two
from stages.scoring.verdicts import DIGITS, Row, by_steps, judge_all, model_scores

OWN = "own"  # the prompt of a model that carries its template
SAMPLED = ("completion", "answer", "correct", "finish_reason", "tokens")  # what a row keeps of each sampled answer


Places = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]  # of test rows, from 0


class Params(StageParams):
    """Greedy, on every test row or some."""

    seed: int  # draws the samples, and the bootstrap of BLEU's interval
    engine: Literal["transformers", "vllm"]
    batch_size: int = Field(gt=0)  # prompts that an engine answers side by side
    vllm: Vllm
    max_new_tokens: int = Field(gt=0)  # an answer cut here counts in `truncated`
    problems: Annotated[int, Field(gt=0)] | Places | None  # the first so many test rows, those at some places, null: all
    subset: Places | None  # test rows whose scores are told apart, beside all that were asked
    base_prompts: tuple[Literal["chatml", "alpaca", "few_shot"], ...] = Field(strict=False, min_length=1)
    n_samples: int = Field(gt=0)
    temperature: float = Field(gt=0)  # of the samples


def run(p: Params, *, model: Path, mix: Path, workers: int, out_metrics: Path, out_predictions: Path) -> None:
    """Writes the scores, with the prompt that earned them, and one row an answer."""
    engine = start_engine(p.engine, model, p.batch_size, p.vllm, workers)
    rows = list(read_rows(mix / "test.jsonl"))
    test = rows[: p.problems] if p.problems is None or isinstance(p.problems, int) else _at(rows, p.problems, "problems")
    subset = _at(rows, p.subset, "subset") if p.subset else []
    if any(row not in test for row in subset):
        raise InputError("params.yaml: eval.subset names a place that eval.problems leaves out: ask all problems, or fewer apart")
    templates = {OWN: engine.template} if engine.template else {
        name: (mix / "prompts" / f"{name}.jinja").read_text(encoding="utf-8") for name in p.base_prompts
    }  # fmt: skip

    greedy = Sampling(p.max_new_tokens)
    started = time.monotonic()
    answers = {name: ask(engine, name, template, test, greedy) for name, template in templates.items()}
    measures.note(answering_seconds=round(time.monotonic() - started, 2))
    judged = {name: judge_all(rows, test) for name, rows in answers.items()}
    scores = {name: model_scores(found, seed=p.seed) for name, found in judged.items()}
    best = max(scores, key=lambda name: scores[name]["pass_at_1"])

    found = {
        "prompt": best,
        "scores": scores[best],
        "by_steps": by_steps(judged[best]),
        "prompts": scores,
        "bleu_signature": bleu.signature(),
    }
    if subset:
        named = {row["id"] for row in subset}
        found["subset"] = model_scores(judge_all([row for row in answers[best] if row["id"] in named], subset), seed=p.seed)
    if p.n_samples > 1:
        samples = _samples(p, engine, best, templates[best], test)
        found["samples"] = _sample_scores(p, samples, test)
        for row, drawn in zip(answers[best], samples, strict=True):
            row["samples"] = drawn

    write_rows(out_predictions, answers[best])
    write_json(out_metrics, found)
    measures.note(tokens=sum(row["tokens"] for rows in answers.values() for row in rows))


def _at(rows: list[Row], places: Places, name: str) -> list[Row]:
    """The rows at these places, in the order of the test."""
    if beyond := [place for place in places if not 0 <= place < len(rows)]:
        raise InputError(f"params.yaml: eval.{name} names place {beyond[0]} of a test of {len(rows)} rows: count from 0")
    return [rows[place] for place in sorted(set(places))]


def _samples(p: Params, engine: Engine, prompt: str, template: str, test: list[Row]) -> list[list[Row]]:
    """The sampled answers to each question, `n_samples` of them, in the order of the test."""
    repeated = [row for row in test for _ in range(p.n_samples)]
    rows = ask(engine, prompt, template, repeated, Sampling(p.max_new_tokens, p.temperature, p.seed))
    answers = [{key: row[key] for key in SAMPLED} for row in rows]
    return [answers[start : start + p.n_samples] for start in range(0, len(answers), p.n_samples)]


def _sample_scores(p: Params, samples: list[list[Row]], test: list[Row]) -> Row:
    """pass@k and maj@k at the powers of two up to `n_samples`; votes are the declared numbers."""
    correct = [[answer["correct"] for answer in answers] for answers in samples]
    votes = [[parse_number(answer["answer"] or "") for answer in answers] for answers in samples]
    right = [gold_answer(row["answer"]) for row in test]
    return {
        "n_samples": p.n_samples,
        "temperature": p.temperature,
        "pass_at_k": {str(k): round(pass_at_k(correct, k), DIGITS) for k in powers_of_two(p.n_samples)},
        "maj_at_k": {str(k): round(majority_at_k(votes, right, k), DIGITS) for k in powers_of_two(p.n_samples)},
    }
