"""What the client of wandb 0.31 recorded offline, read by its own protocol's messages.

Its own reader is a Go program that only sends; the file is a log in LevelDB's format: blocks of 32 KiB, records in pieces.
"""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768
WHOLE, LAST = 1, 4


def records(path: Path):
    """The records of a .wandb file, in order."""
    data, place, piece = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        piece += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            piece = b""
            yield record


class Recorded:
    """One run as its folder below wandb/ has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        for record in records(next(folder.glob("*.wandb"))):
            match record.WhichOneof("record_type"):
                case "run":
                    self.run = record.run
                    self.config |= _values(record.run.config.update)
                case "config":
                    self.config |= _values(record.config.update)
                case "history":
                    self.rows.append(_values(record.history.item))
                case "summary":
                    self.summary |= _values(record.summary.update)
                case "exit":
                    self.exit_code = record.exit.exit_code

    def curve(self) -> list[dict[str, Any]]:
        """The logged figures without the client's own, step first."""
        return [
            {"step": row["_step"], **{name: value for name, value in row.items() if not name.startswith("_")}}
            for row in self.rows
            if "completions" not in row
        ]


def _values(items) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def recorded(home: Path) -> list[Recorded]:
    """Every run below a repository's wandb/, the oldest first."""
    return [Recorded(folder) for folder in sorted((home / "wandb").glob("offline-run-*"))]
