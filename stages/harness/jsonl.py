"""JSON Lines and JSON files, written the same way every time and read with errors that name the line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a UTF-8 JSON Lines file; blank lines are passed over.

    Raises InputError with file and line for a missing file, text that is not JSON, or a line that is not an object.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that writes it, or put the file there")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg}): mend or remove the line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            yield row


def read_json(path: Path) -> Any:
    """The value in a JSON file, or InputError that names the file."""
    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that writes it, or put the file there")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes one object a line, keys in the order given, and returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
