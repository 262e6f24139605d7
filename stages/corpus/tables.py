"""Rows from the files that sources come in: JSON Lines, parquet and CSV.

Reading stops only at a file that is none of these; a row that cannot be read comes out as Unusable, to be counted.
"""

import csv
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.corpus.schemas import Unusable
from stages.harness.errors import InputError

SUFFIXES = (".jsonl", ".parquet", ".csv")
BATCH = 1024  # rows of a parquet file decoded at once
LONGEST_FIELD = 2**31 - 1  # of a CSV file, in characters

Read = dict[str, Any] | Unusable


class Rows(Sequence[Read]):
    """The rows of several files, one after the other, each a mapping that is read when it is asked for."""

    def __init__(
        self, paths: Sequence[Path], columns: Mapping[str, str] | None = None, most: int | None = None
    ) -> None:
        """`columns` names a field's column where the files call it otherwise: {"problem": "Aufgabe"}; `most`: the first so many.

        Raises InputError for a file that is missing, of a kind that is not known, or not what its name says.
        """
        tables = [_open(path) for path in paths]
        self.columns = columns or {}
        self.places = [(table, place) for table in tables for place in range(len(table))][:most]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Read:
        table, place = self.places[number]
        row = table[place]
        if self.columns and isinstance(row, dict):
            return {**row, **{field: row.get(column) for field, column in self.columns.items()}}
        return row


def _open(path: Path) -> Sequence[Read]:
    kinds = {".jsonl": _JsonLines, ".parquet": _Parquet, ".csv": lambda path: list(_csv(path))}
    if path.suffix not in kinds:
        raise InputError(f"{path} is not one of {', '.join(SUFFIXES)}: give a table of one of these kinds")
    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that writes it, or put the file there")
    return kinds[path.suffix](path)


class _JsonLines(Sequence[Read]):
    """A JSON object a line; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.numbers, self.starts, self.lengths, start = array("Q"), array("Q"), array("Q"), 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                self.numbers.append(number)
                self.starts.append(start)
                self.lengths.append(len(line))
            start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: int) -> Read:
        try:  # at a place of its own choice: processes that share the open file would move each other's
            row = json.loads(os.pread(self.file.fileno(), self.lengths[place], self.starts[place]))
        except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
            row = None
        return row if isinstance(row, dict) else Unusable(f"line {self.numbers[place]}", "no JSON object")


class _Parquet(Sequence[Read]):
    def __init__(self, path: Path) -> None:
        from pyarrow.parquet import ParquetFile

        self.path = path
        self.file = self._try(lambda: ParquetFile(path))

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __getitem__(self, place: int) -> Read:
        try:
            return self._table.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError:
            return Unusable("", "a field is not Unicode")

    @cached_property
    def _table(self):
        import pyarrow

        batches = self._try(lambda: list(self.file.iter_batches(BATCH)))  # half the memory of reading it at once
        return pyarrow.Table.from_batches(batches, self.file.schema_arrow)

    def _try(self, read):
        import pyarrow

        try:
            return read()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self.path} is no parquet file ({str(error).splitlines()[0]}): get it anew") from None


def _csv(path: Path) -> Iterator[Read]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield Unusable(f"line {reader.line_num}", "no CSV")
            else:
                yield Unusable(f"line {reader.line_num}", "more fields than columns") if None in row else row
