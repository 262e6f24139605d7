"""Mixing, splitting and counting rows, each in an order that a seed decides."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stages.harness.errors import InputError

Row = TypeVar("Row")


def shuffled(rows: Sequence[Row], *seed: int | str) -> list[Row]:
    """The rows in an order that the seed decides, alike on every platform."""
    rows = list(rows)
    random.Random("/".join(map(str, seed))).shuffle(rows)
    return rows


def with_share(main: Sequence[Row], added: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Every main row, and so many added rows that they are `share` of the total: int(len(main) * share / (1 - share)).

    This is the report's rule: 19,252 reasoning rows and a share of 0.25 take 6,417 chat rows. Raises InputError where
    there are too few.
    """
    wanted = int(len(main) * share / (1 - share))
    if wanted > len(added):
        raise InputError(f"a share of {share} needs {wanted} rows and the source holds {len(added)}: fetch more of it")
    return list(main), list(added[:wanted])


def held_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """The first 1 - share of the rows, and the rest: 25,669 rows and 0.2 give 20,535 and 5,134."""
    kept = int(len(rows) * (1 - share) + 1e-9)
    return list(rows[:kept]), list(rows[kept:])


class Account:
    """Counts of what became of every row, for data/mix/account.json."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def keep(self, what: str, rows: Iterable[Row], **reasons: Callable[[Row], bool]) -> list[Row]:
        """The rows for which no reason to drop holds; each dropped row counts under the first reason that does."""
        counts = self.counts.setdefault(what, Counter())
        kept = []
        for row in rows:
            counts["read"] += 1
            reason = next((name for name, drops in reasons.items() if drops(row)), None)
            if reason:
                counts[f"dropped: {reason.replace('_', ' ')}"] += 1
            else:
                kept.append(row)
        return kept

    def used(self, what: str, **numbers: int) -> None:
        """Sets counts such as train=20_535."""
        self.counts.setdefault(what, Counter()).update(numbers)

    def as_json(self) -> dict[str, dict[str, int]]:
        """The counts, ready to be written."""
        return {what: dict(counts) for what, counts in self.counts.items()}
