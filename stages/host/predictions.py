"""Every answer of a run, packed for the page's browser: columns as JSON, gzip, base64."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

from stages.harness.errors import InputError
from stages.host.results import PREDICTIONS, TEST, Results, Row, is_gguf
from stages.scoring.answers import gold_text, parse_number

# A verdict is the sum of what holds; report.js reads the same bits.
CORRECT, CORRECT_FLEXIBLE, PARSED, TRUNCATED = 1, 2, 4, 8
NOT_ASKED = -1
LEVEL = 6  # of gzip; 9 takes twice the time for a hundredth of the size

_CALCULATOR_MARKS = re.compile(r"<<[^<>]*>>")


def missing(results: Results) -> str | None:
    """One sentence that says which answers are not on disk and what brings them, or None where all are there."""
    absent = [str(PREDICTIONS / f"{name}.jsonl") for name in results.models if name not in results.predictions]
    if results.test is None:
        absent = [str(TEST), *absent]
    if not absent:
        return None
    named = ", ".join(absent) if len(absent) < 4 else f"{absent[0]} and {len(absent) - 1} files more"
    return f"Not here: {named}. Bring them with `dvc pull`, or make them with `dvc repro`."


def pack(results: Results) -> str | None:
    """The answers and what was asked, ready to stand in a script element, or None where there is nothing to show.

    Unpacked it is `{"models", "ids", "steps", "gold", "texts", "answers"}`: one entry a problem in `ids` to `texts`,
    one a model in `models` and `answers`. A problem's texts are its question, its solution without calculator marks,
    and each different completion once, side by side, so that gzip finds them alike; `answers[m].text` says which of
    them is model m's, NOT_ASKED for none. Raises InputError where a prediction's id is not in the test set.
    """
    if results.test is None or not results.predictions:
        return None
    places = {row["id"]: place for place, row in enumerate(results.test)}
    texts = [[row["question"], _CALCULATOR_MARKS.sub("", row["answer"])] for row in results.test]
    named, answers = [], []
    for name, rows in _columns(results):
        named.append(name)
        answers.append(_answers(name, rows, places, texts))
    packed = {
        "models": named,
        "ids": list(places),
        "steps": [row["steps"] for row in results.test],
        "gold": [gold_text(row["answer"]) for row in results.test],
        "texts": texts,
        "answers": answers,
    }
    text = json.dumps(packed, ensure_ascii=False, separators=(",", ":"))
    # No file name and no time in the header: the same answers give the same page.
    return base64.b64encode(gzip.compress(text.encode(), LEVEL, mtime=0)).decode()


def _columns(results: Results) -> Iterator[tuple[dict[str, str], list[Row]]]:
    """Each model's name, hue and rows: the merged models first, then each GGUF form apart."""
    for name in results.trained:
        if name in results.predictions:
            yield {"name": name, "hue": results.hue(name), "form": ""}, results.predictions[name]
    for name in filter(is_gguf, results.predictions):
        forms: dict[str, list[Row]] = {}
        for row in results.predictions[name]:
            forms.setdefault(row["form"], []).append(row)
        for form, rows in forms.items():
            yield {"name": name.removesuffix("-gguf"), "hue": results.hue(name), "form": form}, rows


def _answers(
    about: dict[str, str], rows: list[Row], places: dict[str, int], texts: list[list[str]]
) -> dict[str, list[Any]]:
    """One model's columns, in the order of the test; adds its completions to `texts`."""
    n = len(places)
    text, declared, verdict = [NOT_ASKED] * n, [None] * n, [0] * n
    tokens, finish = [0] * n, [""] * n
    for row in rows:
        if row["id"] not in places:
            file = f"{PREDICTIONS}/{about['name']}{'-gguf' if about['form'] else ''}.jsonl"
            raise InputError(f"{file} answers {row['id']!r}, which {TEST} lacks: run `dvc repro`")
        place = places[row["id"]]
        known, completion = texts[place], row["completion"]
        if completion not in known[2:]:
            known.append(completion)
        text[place] = known.index(completion, 2)
        declared[place], tokens[place], finish[place] = row["answer"], row["tokens"], row["finish_reason"]
        parsed = row["answer"] is not None and parse_number(row["answer"]) is not None
        verdict[place] = (
            CORRECT * row["correct"]
            + CORRECT_FLEXIBLE * row["correct_flexible"]
            + PARSED * parsed
            + TRUNCATED * (row["finish_reason"] == "length")
        )
    return {"text": text, "declared": declared, "verdict": verdict, "tokens": tokens, "finish": finish}
