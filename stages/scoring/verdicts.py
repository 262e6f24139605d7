"""From prediction rows to verdicts, and from verdicts to a model's place in metrics.json: the one way there is.

A prediction is `{"id", "completion", "finish_reason"}`, of which only the completion must be there. A gold row is
GSM8K's `{"question", "answer"}`, with an `"id"` where the prediction has one, and `"steps"` where they were counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stages.harness.errors import InputError
from stages.scoring import bleu
from stages.scoring.answers import equal, extract_flexible, extract_strict, gold_answer, parse_number
from stages.scoring.statistics import wilson

Row = dict[str, Any]
DIGITS = 6  # of every fraction in metrics.json


@dataclass(frozen=True)
class Verdict:
    answer: str | None  # the declared answer's text, whether a number or not
    correct: bool  # the declared answer is the gold value
    correct_flexible: bool  # the last number in the text is
    parsed: bool  # the declared answer is one number


def judge(completion: str, gold: Fraction) -> Verdict:
    """One completion against one gold value."""
    answer = extract_strict(completion)
    value = parse_number(answer) if answer is not None else None
    return Verdict(answer, equal(value, gold), equal(extract_flexible(completion), gold), value is not None)


def join(predictions: Sequence[Row], gold_rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs each prediction with its gold row, in the order of the gold rows.

    By id when the rows of both have one, compared as text; by order otherwise. Where only the predictions have ids and
    those are exactly 0 to n - 1, they are row numbers, so that a shuffled file is not scored against other problems.
    Raises InputError, which counts rows from 1, for no rows, another number of predictions than of gold rows, a row
    without completion or answer, ids in some rows but not in all, an id that comes twice or that the gold rows lack.
    """
    if not predictions:
        raise InputError("there are no predictions to score")
    if len(predictions) != len(gold_rows):
        raise InputError(f"{len(predictions)} predictions for {len(gold_rows)} gold rows: give one for each")
    for kind, rows, field in (("prediction", predictions, "completion"), ("gold", gold_rows, "answer")):
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(field), str):
                raise InputError(f"{kind} row {number}: '{field}' is missing or no text")
    predicted, known = _by_id("prediction", predictions), _by_id("gold", gold_rows)
    rows_by_number = {str(number): row for number, row in enumerate(gold_rows)}
    if predicted is not None and known is None and predicted.keys() == rows_by_number.keys():
        known = rows_by_number
    if predicted is None or known is None:
        return list(zip(predictions, gold_rows, strict=True))
    for number, id in enumerate(predicted, 1):
        if id not in known:
            raise InputError(f"prediction row {number}: the gold rows have no id {id!r}")
    return [(predicted[id], row) for id, row in known.items()]


def _by_id(kind: str, rows: Sequence[Row]) -> dict[str, Row] | None:
    """The rows by id as text, in their order, or None where none has an id."""
    if all("id" not in row for row in rows):
        return None
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        if "id" not in row:
            raise InputError(f"{kind} row {number} has no id though other rows do: give it one")
        if str(row["id"]) in found:
            raise InputError(f"{kind} row {number}: id {row['id']!r} has come before")
        found[str(row["id"])] = row
    return found


@dataclass(frozen=True)
class Judged:
    """Predictions beside their gold rows, in the order of the gold rows, each with its verdict."""

    predictions: tuple[Row, ...]
    gold: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    def correct(self) -> list[bool]:
        """Which are right, strictly read."""
        return [verdict.correct for verdict in self.verdicts]


def judge_all(predictions: Sequence[Row], gold_rows: Sequence[Row]) -> Judged:
    """Joins and judges rows. Raises InputError as `join` does, and for a gold answer that is no number."""
    pairs = join(predictions, gold_rows)
    verdicts = []
    for number, (prediction, row) in enumerate(pairs, 1):
        try:
            gold = gold_answer(row["answer"])
        except InputError as error:
            raise InputError(f"gold row {number}: {error}") from None
        verdicts.append(judge(prediction["completion"], gold))
    return Judged(*map(tuple, zip(*pairs, strict=True)), tuple(verdicts))


def model_scores(judged: Judged, *, seed: int, resamples: int = 1000) -> Row:
    """A model's object in metrics.json: fractions in 0..1, six digits, and the number of problems `n`.

    `unparsed` is the share without a declared answer that is one number, `truncated` the share cut at the length limit
    (finish_reason "length"; rows that do not say count as whole). `seed` draws the bootstrap of BLEU's interval.
    """
    n, right = len(judged.verdicts), sum(judged.correct())
    low, high = wilson(right, n)
    completions = [row["completion"] for row in judged.predictions]
    answers = [row["answer"] for row in judged.gold]
    statistics = bleu.sentence_statistics(
        [bleu.normalised_completion(text) for text in completions],
        [bleu.normalised_reference(text) for text in answers],
    )
    bleu_low, bleu_high = bleu.interval(statistics, seed, resamples)
    fractions = {
        "pass_at_1": right / n,
        "pass_at_1_low": low,
        "pass_at_1_high": high,
        "pass_at_1_flexible": sum(verdict.correct_flexible for verdict in judged.verdicts) / n,
        "bleu": bleu.score(statistics),
        "bleu_low": bleu_low,
        "bleu_high": bleu_high,
        "bleu_raw": bleu.score(bleu.sentence_statistics(completions, answers)),
        "unparsed": sum(not verdict.parsed for verdict in judged.verdicts) / n,
        "truncated": sum(row.get("finish_reason") == "length" for row in judged.predictions) / n,
    }
    return {name: round(value, DIGITS) for name, value in fractions.items()} | {"n": n}


def steps(gold_row: Row) -> int:
    """How many calculations the gold solution takes: the row's own count, else its number of `<<...>>` marks."""
    return int(gold_row["steps"]) if "steps" in gold_row else gold_row["answer"].count("<<")


def by_steps(judged: Judged) -> dict[str, Row]:
    """pass@1, strict and flexible, and the number of problems `n`, apart for each number of steps: `{"1": {...}, ...}`."""
    groups: dict[int, list[Verdict]] = {}
    for row, verdict in zip(judged.gold, judged.verdicts, strict=True):
        groups.setdefault(steps(row), []).append(verdict)
    return {
        str(count): {
            "pass_at_1": round(sum(verdict.correct for verdict in verdicts) / len(verdicts), DIGITS),
            "pass_at_1_flexible": round(sum(verdict.correct_flexible for verdict in verdicts) / len(verdicts), DIGITS),
            "n": len(verdicts),
        }
        for count, verdicts in sorted(groups.items())
    }
