"""Our verdicts beside those of lm-evaluation-harness's gsm8k task, on the same completions: where they differ, and why.

lm-eval is installed in an environment of its own, so that it moves nothing of ours:

    uv run --no-project --python 3.11 --with lm-eval==0.4.13 --with-requirements benchmarks/lm_eval_agreement.txt \\
        python -m benchmarks.lm_eval_agreement data/mix/test.jsonl results/predictions/*.jsonl

The first file holds the gold rows, the others predictions by id. lm-eval's own task file, filters and metric are used.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from ruamel.yaml import YAML

from stages.scoring.answers import find_declaration, gold_answer, parse_number, until_stop
from stages.scoring.verdicts import judge

TASK = YAML(typ="safe").load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())


class Theirs:
    """One of the gsm8k task's filters (`strict-match`, `flexible-extract`) with the task's metric."""

    def __init__(self, name: str) -> None:
        step = next(entry["filter"][0] for entry in TASK["filter_list"] if entry["name"] == name)
        self.filter = RegexFilter(**{key: value for key, value in step.items() if key != "function"})
        metric = TASK["metric_list"][0]
        self.options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    def verdict(self, completion: str, gold: str) -> tuple[str, bool]:
        """What it extracts, and whether that equals the gold answer."""
        [[found]] = self.filter.apply([[completion]], [{}])
        return found, bool(exact_match_hf_evaluate([found], [gold], **self.options)["exact_match"])


def why_strict(completion: str, found: str, ours: bool) -> str:
    """The reason for a difference between the strict readings."""
    declared = find_declaration(completion)
    if found == "[invalid]":
        notation = "A: N" if declared is None else completion[declared.start : declared.start + 10]
        if notation.startswith("<SOLUTION>"):
            return "the answer stands in the solution tag, which theirs does not read"
        if notation.startswith("\\"):
            return "the answer is boxed, which theirs does not read"
        if notation.startswith("####"):
            return "theirs wants one space and a digit after ####: money, a tag or no space hides the number"
        return "the last line is `A: N`, which theirs does not read"
    first = completion.partition("####")[2]
    if completion.count("####") > 1 and declared and completion.rfind("####") <= declared.start:
        return "several #### lines: theirs reads the first, ours the last"
    if declared and completion[declared.start :].startswith(("<SOLUTION>", "\\")):
        return "another notation follows the #### line: ours reads what comes last"
    if ours and parse_number(found) is not None:
        return "equal numbers written differently (18.0 and 18): theirs compares texts, ours values"
    if not ours and parse_number(first.split("\n")[0]) is None:
        return "the #### line holds more than one number: theirs takes the first, ours refuses"
    if ours:
        return "theirs cuts a fraction, an exponent or a scale word off the number"
    return "other"


def why_flexible(completion: str, found: str, ours: bool) -> str:
    """The reason for a difference between the readings of the last number."""
    if until_stop(completion) != completion:
        return "theirs reads on after a stop token"
    if not re.search(r"\d", found):
        return "theirs takes punctuation for a number (a lone `$.` or `..`)"
    if ours and parse_number(found) is not None:
        return "equal numbers written differently (18.0 and 18)" if re.search(r"\.\d", found) else "a unit's power, fraction or exponent is no number of its own"
    if re.search(r"\d-\d", completion[-40:]):
        return "theirs reads the minus of 16-3 as a sign"
    return "a full stop, fraction or exponent is cut or kept differently"


def main(gold_file: str, *prediction_files: str) -> None:
    """Prints one Markdown table for each reading."""
    gold = {row["id"]: row["answer"] for row in map(json.loads, Path(gold_file).read_text().splitlines())}
    rows = [row for file in prediction_files for row in map(json.loads, Path(file).read_text().splitlines())]
    for name, why in (("strict-match", why_strict), ("flexible-extract", why_flexible)):
        theirs, reasons, agree = Theirs(name), Counter(), 0
        for row in rows:
            verdict = judge(row["completion"], gold_answer(gold[row["id"]]))
            ours = verdict.correct if name == "strict-match" else verdict.correct_flexible
            found, right = theirs.verdict(row["completion"], gold[row["id"]])
            agree += ours == right
            if ours != right:
                reasons[(ours, why(row["completion"], found, ours))] += 1
        print(f"\n{name}: {agree} of {len(rows)} verdicts equal\n\n| rows | ours | theirs | why |\n| --- | --- | --- | --- |")
        for (ours, reason), count in reasons.most_common():
            print(f"| {count} | {'right' if ours else 'wrong'} | {'wrong' if ours else 'right'} | {reason} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
