"""eval-gguf: what export and quantisation cost: each GGUF form's greedy answers through llama.cpp.

The model is asked exactly as eval asked it, so that the same text can be expected: `same_text` is the share of answers
that are letter for letter those of the merged model. A form that loses more than it may stops the graph here.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.harness.params import StageParams
from stages.harness.workers import side_by_side
from stages.inference.asking import ask
from stages.inference.engine import Sampling
from stages.inference.llama_cpp_engine import LlamaCppEngine
from stages.scoring.statistics import paired_difference
from stages.scoring.verdicts import DIGITS, judge_all, model_scores


class LargestDrop(StageParams):
    """What a form may lose in pass@1 against the merged model: a fraction, or null where anything may be lost.

    The whole 95% interval of the paired difference must lie beyond it to count: a few problems more or less do not.
    """

    f16: float | None = Field(ge=0)
    q8_0: float | None = Field(ge=0)
    q4_k_m: float | None = Field(ge=0)


class Params(StageParams):
    """Greedy; every form answers the same problems."""

    seed: int  # draws the bootstrap of BLEU's interval
    scored: Literal["f16", "q8_0", "q4_k_m"]
    largest_drop: LargestDrop
    problems: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)
    sequences: int = Field(gt=0)
    context: int = Field(gt=0)
    threads: int = Field(gt=0)


def run(p: Params, *, gguf: Path, mix: Path, reference: Path, workers: int, out_metrics: Path, out_predictions: Path) -> None:
    """Writes the scored form's scores, every form's beside the merged model's text, and one row an answer and form."""
    merged = list(read_rows(reference))[: p.problems]
    asked = {row["id"] for row in merged}
    test = [row for row in read_rows(mix / "test.jsonl") if row["id"] in asked]
    forms = [file.stem for file in sorted(gguf.glob("*.gguf"))]
    if p.scored not in forms:
        raise InputError(f"{gguf} has no {p.scored}.gguf, which eval_gguf.scored names: add it to gguf_export.files")

    name = merged[0]["prompt"]
    answers = dict(side_by_side(lambda form: _answers(p, gguf / f"{form}.gguf", name, mix, test), forms, workers // p.threads))
    judged = {form: judge_all(rows, test) for form, rows in answers.items()}
    scores = {form: model_scores(found, seed=p.seed) for form, found in judged.items()}
    right = [row["correct"] for row in merged]
    drops = {form: paired_difference(right, found.correct()) for form, found in judged.items()}
    for form, drop in drops.items():
        allowed = getattr(p.largest_drop, form)
        if allowed is not None and drop["low"] > allowed:
            raise InputError(
                f"{gguf}/{form}.gguf loses {100 * drop['difference']:.1f} points of pass@1 against the merged model "
                f"({100 * drop['low']:.1f} at least), more than eval_gguf.largest_drop.{form} allows "
                f"({100 * allowed:.1f}): mend the export, or allow more"
            )
    tensors = read_json(gguf / "tensors.json")
    write_rows(out_predictions, (row for form in forms for row in answers[form]))
    write_json(out_metrics, {
        "prompt": name,
        "form": p.scored,
        "scores": scores[p.scored],
        "forms": {
            form: {
                "pass_at_1": scores[form]["pass_at_1"],
                "drop": {key: round(drops[form][key], DIGITS) for key in ("difference", "low", "high", "p")},
                "same_text": round(_same(answers[form], merged) / len(merged), DIGITS),
                "n": len(merged),
                "mib": round((gguf / f"{form}.gguf").stat().st_size / 2**20, 3),
                "tensors": tensors.get(form, {}),
            }
            for form in forms
        },
    })  # fmt: skip
    measures.note(tokens=sum(row["tokens"] for rows in answers.values() for row in rows))


def _answers(p: Params, file: Path, name: str, mix: Path, test: list[dict]) -> list[dict]:
    """One form's answers; a base model, which carries no template, is asked in the way named."""
    engine = LlamaCppEngine(file, p.sequences, p.context, p.threads)
    template = engine.template or (mix / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")
    rows = ask(engine, name, template, test, Sampling(p.max_new_tokens))
    engine.close()
    return [{"form": file.stem, **row} for row in rows]


def _same(rows: list[dict], merged: list[dict]) -> int:
    return sum(row["completion"] == reference["completion"] for row, reference in zip(rows, merged, strict=True))
