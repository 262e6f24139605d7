"""eval: one model's greedy answers to the whole test set, and their scores.

A model that carries a chat template is asked with it. The base carries none: it is asked in every way that
`base_prompts` names, and the way that scores best is its score, so that no method beats a base that was asked badly.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.harness import measures
from stages.harness.jsonl import read_rows, write_json, write_rows
from stages.harness.params import StageParams
from stages.inference.asking import ask
from stages.scoring import bleu
from stages.scoring.verdicts import by_steps, model_scores

OWN = "own"  # the prompt of a model that carries its template


class Params(StageParams):
    """Greedy, on every test row or the first so many."""

    seed: int  # draws the bootstrap of BLEU's interval
    engine: Literal["transformers"]
    batch_size: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)  # an answer cut here counts in `truncated`
    problems: int | None = Field(gt=0)  # null: the whole test set
    base_prompts: tuple[Literal["chatml", "alpaca", "few_shot"], ...] = Field(strict=False, min_length=1)


def run(p: Params, *, model: Path, mix: Path, out_metrics: Path, out_predictions: Path) -> None:
    """Writes the scores, with the prompt that earned them, and one row an answer."""
    from stages.inference.transformers_engine import TransformersEngine

    engine = TransformersEngine(model, p.batch_size)
    test = list(read_rows(mix / "test.jsonl"))[: p.problems]
    templates = {OWN: engine.template} if engine.template else {
        name: (mix / "prompts" / f"{name}.jinja").read_text(encoding="utf-8") for name in p.base_prompts
    }  # fmt: skip

    answers = {name: ask(engine, name, template, test, p.max_new_tokens) for name, template in templates.items()}
    scores = {name: model_scores(rows, test, seed=p.seed) for name, rows in answers.items()}
    best = max(scores, key=lambda name: scores[name]["pass_at_1"])

    write_rows(out_predictions, answers[best])
    write_json(out_metrics, {
        "prompt": best,
        "scores": scores[best],
        "by_steps": by_steps(answers[best], test),
        "prompts": scores,
        "bleu_signature": bleu.signature(),
    })  # fmt: skip
    measures.note(tokens=sum(row["tokens"] for rows in answers.values() for row in rows))
