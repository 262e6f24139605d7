"""What fetch brought, read back: data/raw/<source>/ with sources.json, which says what each source is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.corpus import mixing
from stages.corpus.schemas import PROBLEM_SCHEMAS, MathProblem, Row, Schema, Unusable, read_row
from stages.corpus.tables import Rows
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json

Entry = dict[str, Any]


@dataclass(frozen=True)
class SourceRows(Sequence):
    """A source's rows in the form of its schema, each read when it is asked for."""

    name: str
    schema: Schema
    raw: Rows
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return replace(self, order=self.order[place])
        number = self.order[place]
        row, id = self.raw[number], f"{self.name}-{number:06d}"
        return Unusable(row.id or id, row.reason) if isinstance(row, Unusable) else read_row(row, self.schema, id)

    def shuffled(self, *seed: int | str) -> "SourceRows":
        """The same rows in an order that the seed decides."""
        return replace(self, order=mixing.shuffled(self.order, *seed))


class Sources:
    """The sources below data/raw, by the names that fetch.sources gives them."""

    def __init__(self, raw: Path) -> None:
        self.raw, self.about = raw, read_json(raw / "sources.json")

    def __contains__(self, name: str) -> bool:
        return name in self.about

    def problems(self, name: str) -> SourceRows:
        """A source's mathematics problems: each a MathProblem or Unusable."""
        return self._rows(name, *PROBLEM_SCHEMAS)

    def conversations(self, name: str) -> SourceRows:
        """A source's chats: each a Conversation or Unusable."""
        return self._rows(name, "sharegpt")

    def preferences(self, name: str) -> SourceRows:
        """A source's questions with a good and a bad answer: each a Preference or Unusable."""
        return self._rows(name, "preferences")

    def texts(self, name: str) -> SourceRows:
        """A source's texts for pretraining: each a Document, a MathProblem to be rendered as such, or Unusable."""
        return self._rows(name, "documents", *PROBLEM_SCHEMAS)

    def test(self, name: str = "test") -> Iterator[tuple[Row, MathProblem]]:
        """Each row of the test, untouched, and what it asks: nothing may be missing there, so InputError names a bad row."""
        entry = self._entry(name, "gsm8k")
        for number, row in enumerate(self._raw_rows(name, entry), 1):
            problem = row if isinstance(row, Unusable) else read_row(row, entry["schema"], f"{name}-{number - 1:06d}")
            if isinstance(problem, Unusable):
                raise InputError(f"{self.raw / name / entry['files'][0]['name']}, row {number}: {problem.reason}: mend the row, "
                                 "for none of the test may be left out")  # fmt: skip
            yield row, problem

    def test_questions(self) -> dict[str, str]:
        """What the test asks, by the ids that its rows get."""
        return {f"test-{number:06d}": problem.question for number, (_, problem) in enumerate(self.test())}

    def _rows(self, name: str, *schemas: str) -> "SourceRows":
        entry = self._entry(name, *schemas)
        raw = self._raw_rows(name, entry)
        return SourceRows(name, entry["schema"], raw, range(len(raw)))

    def _raw_rows(self, name: str, entry: Entry) -> Rows:
        return Rows([self.raw / name / file["name"] for file in entry["files"]], entry["columns"], entry["rows"])

    def _entry(self, name: str, *schemas: str) -> Entry:
        if name not in self:
            raise InputError(
                f"params.yaml: fetch.sources.{name} is none, and this stage needs it: give it another kind"
            )
        entry = self.about[name]
        if entry["schema"] not in schemas:
            raise InputError(f"params.yaml: fetch.sources.{name} has schema {entry['schema']}, and this stage reads "
                             f"{' or '.join(schemas)}: give it such a source")  # fmt: skip
        return entry
