"""Mixing, splitting and counting rows, each in an order that a seed decides."""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stages.corpus.schemas import Unusable

Row = TypeVar("Row")

EXAMPLES = 3  # rows shown of each finding
SHOWN = 160  # characters of each


def shuffled(rows: Iterable[Row], *seed: int | str) -> list[Row]:
    """The rows in an order that the seed decides, alike on every platform."""
    rows = list(rows)
    random.Random("/".join(map(str, seed))).shuffle(rows)
    return rows


def added_rows(main: int, share: float) -> int:
    """How many rows join `main` rows to be `share` of the total: int(main * share / (1 - share)).

    This is the report's rule: 19,252 reasoning rows and a share of 0.25 take 6,417 chat rows.
    """
    return int(main * share / (1 - share))


def held_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """The first 1 - share of the rows, and the rest: 25,669 rows and 0.2 give 20,535 and 5,134."""
    kept = int(len(rows) * (1 - share) + 1e-9)
    return list(rows[:kept]), list(rows[kept:])


@dataclass
class Finding:
    """What one check found: how many rows, how many of them it dropped, and some of them to look at."""

    rows: int = 0
    dropped: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    like: dict[str, str] = field(default_factory=dict)  # of each row found the one it is like, where the check knows


class Account:
    """What became of every row: written to data/mix/account.json and data/pairs/account.json.

    Each entry holds `read`, `kept`, `findings` by reason, and whatever `used` adds. read is kept and all that was dropped.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def keep(
        self,
        what: str,
        rows: Iterable[Row | Unusable],
        *,
        only_counted: Collection[str] = (),
        most: int | None = None,
        **checks: Callable[[Row], bool | str | None],
    ) -> list[Row]:
        """The rows in which no check finds anything; a dropped row counts under the first that does.

        Rows are objects with an `id` and a text `asked`, which examples show. A check may return the id of the row that this
        one is like. A check named in `only_counted` drops nothing: its finding is counted, and the row goes on to the next.
        Unusable rows count under their own reason. Reading ends when `most` rows are kept.
        """
        entry = self.entries.setdefault(what, {"read": 0, "kept": 0, "findings": {}})
        kept: list[Row] = []
        rows = iter(rows)
        while (most is None or len(kept) < most) and (row := next(rows, None)) is not None:
            entry["read"] += 1
            if isinstance(row, Unusable):
                _note(entry["findings"], row.reason, row, True)
                continue
            for name, check in checks.items():
                if found := check(row):
                    _note(entry["findings"], name.replace("_", " "), row, name not in only_counted, found)
                    if name not in only_counted:
                        break
            else:
                kept.append(row)
        entry["kept"] += len(kept)
        return kept

    def used(self, what: str, **numbers: Any) -> None:
        """Adds figures such as train=20_535 to an entry."""
        self.entries.setdefault(what, {}).update(numbers)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The entries, ready to be written."""
        return {
            what: {
                **entry,
                **(
                    {"findings": {why: vars(finding) for why, finding in entry["findings"].items()}}
                    if "findings" in entry
                    else {}
                ),
            }
            for what, entry in self.entries.items()
        }


def _note(findings: dict[str, Finding], reason: str, row: Any, dropped: bool, like: bool | str = True) -> None:
    finding = findings.setdefault(reason, Finding())
    finding.rows += 1
    finding.dropped += dropped
    if len(finding.examples) < EXAMPLES:
        finding.examples.append({"id": row.id, "text": row.asked[:SHOWN]})
    if isinstance(like, str):
        finding.like[row.id] = like
