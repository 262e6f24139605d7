"""`mathmind score`: scores prediction files, whoever made them, as eval does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows
from stages.scoring import bleu
from stages.scoring.statistics import paired_difference
from stages.scoring.verdicts import DIGITS, Row, by_steps, judge_all, model_scores

if TYPE_CHECKING:
    from rich.console import RenderableType

_DESCRIBED = {
    "problems": "{n}",
    "pass@1": "{pass_at_1}% ({pass_at_1_low} to {pass_at_1_high})",
    "pass@1, last number": "{pass_at_1_flexible}%",
    "BLEU": "{bleu} ({bleu_low} to {bleu_high})",
    "BLEU, raw text": "{bleu_raw}",
    "unparsed": "{unparsed}%",
    "cut off": "{truncated}%",
}


class Scored:
    """One prediction file against one file of GSM8K-schema rows."""

    def __init__(self, predictions: Path, gold: Path, seed: int) -> None:
        """Raises InputError that names both files where their rows do not fit together."""
        self.predictions = predictions
        found, known = list(read_rows(predictions)), list(read_rows(gold))
        try:
            self.judged = judge_all(found, known)
            self.scores = model_scores(self.judged, seed=seed)
            self.by_steps = by_steps(self.judged)
        except InputError as error:
            raise InputError(f"{predictions} against {gold}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """A model's object as in metrics.json, its pass@1 by number of steps, and sacrebleu's signature."""
        return {**self.scores, "by_steps": self.by_steps, "bleu_signature": bleu.signature()}

    def percent(self) -> dict[str, str]:
        """The scores as they are read: fractions in hundredths, with one decimal."""
        return {name: str(value) if name == "n" else f"{100 * value:.1f}" for name, value in self.scores.items()}

    def rows(self) -> list[Row]:
        """Each verdict, in the order of the gold rows; rows without an id go by their number, from 0."""
        return [
            {
                "id": prediction.get("id", gold.get("id", number)),
                "answer": verdict.answer,
                "correct": verdict.correct,
                "correct_flexible": verdict.correct_flexible,
            }
            for number, (prediction, gold, verdict) in enumerate(
                zip(self.judged.predictions, self.judged.gold, self.judged.verdicts, strict=True)
            )
        ]


def paired(first: Scored, second: Scored) -> dict[str, float]:
    """The difference in pass@1, first less second, with its 95% interval and McNemar's exact p."""
    found = paired_difference(first.judged.correct(), second.judged.correct())
    return {name: float(f"{value:.{DIGITS}g}") for name, value in found.items()}


def as_json(scored: list[Scored]) -> dict[str, Any]:
    """One file's object, or both under `models`, by file, and their paired test under `pair`."""
    if len(scored) == 1:
        return scored[0].as_json()
    return {"models": {str(one.predictions): one.as_json() for one in scored}, "pair": paired(*scored)}


def as_table(scored: list[Scored]) -> "RenderableType":
    """The same for a terminal, fractions as percentages."""
    from rich.console import Group
    from rich.table import Column, Table

    table = Table("", *(Column(str(one.predictions), overflow="fold") for one in scored))
    for label, described in _DESCRIBED.items():
        table.add_row(label, *(described.format(**one.percent()) for one in scored))
    for count in scored[0].by_steps:
        groups = [one.by_steps[count] for one in scored]
        table.add_row(f"steps: {count}", *(f"{100 * group['pass_at_1']:.1f}% of {group['n']}" for group in groups))
    if len(scored) == 1:
        return table
    pair = {name: 100 * value if name != "p" else value for name, value in paired(*scored).items()}
    tested = "difference {difference:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, p = {p:.2g} (McNemar, exact)"
    return Group(table, tested.format(**pair))
