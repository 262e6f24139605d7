"""What the wrong answers of each model of the embedded profile are: `python benchmarks/wrong_answers.py`.

Reads results/predictions and data/mix/test.jsonl; needs `dvc repro` or `dvc pull` first. Prints a Markdown table of shares in
per cent, for problems of two and more steps. Each answer counts once, under the first line that fits.
"""

import re
from collections import Counter
from pathlib import Path

from stages.harness.jsonl import read_rows

ROOT = Path(__file__).parents[1]
MODELS = ("base", "sft", "grpo", "orpo", "qlora")
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(?:<<[^>]*>>)?(\d+)")
TRUE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b if b else None}


def equations(text: str) -> list[tuple[int, str, int, int]]:
    """The (left, sign, right, result) of a working, in order."""
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in EQUATION.findall(text)]


def kind(correct: bool, gold: list, told: list) -> str:
    """What an answer is, in the words of the table."""
    if correct:
        return "right"
    if len(told) != len(gold):
        return "too few steps" if len(told) < len(gold) else "too many steps"
    if any(TRUE[sign](left, right) != result for left, sign, right, result in told):
        return "a sum is wrong"
    asked, taken = ([sign for _, sign, _, _ in steps] for steps in (gold, told))
    if taken == asked:
        return "wrong numbers"
    return "wrong operation in the last step" if taken[:-1] == asked[:-1] else "wrong operation elsewhere"


def main() -> None:
    gold = {row["id"]: row for row in read_rows(ROOT / "data/mix/test.jsonl") if row["steps"] > 1}
    counted = {}
    for model in MODELS:
        rows = [row for row in read_rows(ROOT / f"results/predictions/{model}.jsonl") if row["id"] in gold]
        counted[model] = Counter(
            kind(row["correct"], equations(gold[row["id"]]["answer"]), equations(row["completion"])) for row in rows
        )
    kinds = ("right", "wrong operation in the last step", "wrong operation elsewhere", "too few steps",
             "too many steps", "a sum is wrong", "wrong numbers")  # fmt: skip
    print(f"| {len(gold)} problems of two and more steps | {' | '.join(MODELS)} |\n| --- |{' --- |' * len(MODELS)}")
    for name in kinds:
        print(f"| {name} | {' | '.join(f'{100 * counted[model][name] / len(gold):.1f}' for model in MODELS)} |")


if __name__ == "__main__":
    main()
