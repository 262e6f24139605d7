"""What the wrong answers of each model of the embedded profile are: `python benchmarks/wrong_answers.py`.

Reads results/predictions and data/mix/test.jsonl; needs `dvc repro` or `dvc pull` first. Prints two Markdown tables of shares
in per cent, for problems of two and more steps: what the answers are, each counted once, under the first line that fits; and
how many are right by what the last step calls for.
"""

import re
from collections import Counter
from pathlib import Path

from stages.harness.jsonl import read_rows

ROOT = Path(__file__).parents[1]
MODELS = ("base", "sft", "grpo", "orpo", "qlora")
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(?:<<[^>]*>>)?(\d+)")
LAST_STEPS = {"+": "adds", "-": "takes away", "/": "shares out"}
KINDS = (
    "right", "wrong operation in the last step", "wrong operation elsewhere", "too few steps", "too many steps",
    "a sum is wrong", "wrong numbers",
)  # fmt: skip
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
    solved = {identity: equations(row["answer"]) for identity, row in gold.items()}
    asked = Counter(LAST_STEPS[steps[-1][1]] for steps in solved.values())
    kinds, right = {}, {}
    for model in MODELS:
        rows = [row for row in read_rows(ROOT / f"results/predictions/{model}.jsonl") if row["id"] in gold]
        kinds[model] = Counter(kind(row["correct"], solved[row["id"]], equations(row["completion"])) for row in rows)
        right[model] = Counter(LAST_STEPS[solved[row["id"]][-1][1]] for row in rows if row["correct"])
    table(f"{len(gold)} problems of two and more steps", kinds, dict.fromkeys(KINDS, len(gold)))
    table("right, where the last step", right, {name: asked[name] for name in LAST_STEPS.values()})


def table(title: str, counted: dict[str, Counter], out_of: dict[str, int]) -> None:
    """Prints a line a name of `out_of`, with each model's share of that many."""
    print(f"| {title} | {' | '.join(counted)} |\n| --- |{' --- |' * len(counted)}")
    for name, total in out_of.items():
        print(f"| {name} | {' | '.join(f'{100 * counts[name] / total:.1f}' for counts in counted.values())} |")
    print()


if __name__ == "__main__":
    main()
