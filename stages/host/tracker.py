"""The process that follows one stage: reads its rows as they come, and at its end all that it wrote, and logs them.

It is told of the run on stdin, and of its end; where stdin closes without that, the launcher was killed. It says on stdout,
in one line, what went wrong.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Protocol

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows
from stages.host.provenance import read_timing
from stages.host.results import METRICS, TEST, read_curve
from stages.host.tracking import EVENTS, WANDB, Followed, data_pins, read_followed
from stages.training.curves import Curve

POLL = 2.0  # seconds between two looks at a stage's scratch folder
KILLED = 137
LIVE = Path("checkpoints/curve.jsonl")  # in the scratch folder: the curve's rows as a stage logs them, where it does
SAMPLE = 100  # completions of a table

Figures = dict[str, float]


class Sink(Protocol):
    """Where a run is logged. Any of it may raise; the others go on."""

    def rows(self, rows: dict[int, Figures]) -> None:
        """All rows so far, by step; those that it has are passed over."""

    def end(self, status: int, ended: "Ended") -> None: ...


class Ended:
    """What a stage that ended well has written, as far as tracking shows it."""

    def __init__(self, run: Followed) -> None:
        tree = Path(run.tree)
        self.curve: dict[int, Figures] = {}
        self.summary: dict[str, Any] = {"timing": read_timing(tree, run.stage)}
        self.config = data_pins(run, at_the_end=True)
        self.completions: list[list[Any]] = []
        for out in map(Path, run.outs):
            if out.suffix == ".csv":
                self.curve = {int(row.pop("step")): row for row in read_curve(tree / out)}
            elif out == METRICS or out.parent.name == "metrics":
                self.summary |= read_json(tree / out)
            elif out.suffix == ".jsonl":
                self.completions = sample(list(read_rows(tree / out)), tree / TEST)


def main() -> int:
    """Follows the run until it has ended and everything is logged; returns 0 also where something went wrong that it could say."""
    os.nice(5)  # the stage comes first
    run = read_followed(sys.stdin.readline())
    troubles: list[str] = []
    sinks = [sink for make in makers(run) if (sink := attempt(troubles, make)) is not None]
    status = follow(run, sinks, troubles)
    ended = attempt(troubles, lambda: Ended(run)) if status == 0 else None
    for sink in sinks:
        attempt(troubles, lambda: sink.end(status, ended))
    if troubles:
        print(f"{run.stage}: {'; '.join(troubles)}", flush=True)
    return 0


def makers(run: Followed) -> Iterable[Callable[[], Sink]]:
    """What makes the sinks that params.yaml asks for; the libraries are loaded here alone."""
    if run.tensorboard:
        from stages.host.event_files import EventFile

        yield lambda: EventFile(run)
    if run.wandb != "disabled":
        from stages.host.wandb_runs import WandbRun

        yield lambda: WandbRun(run)


def follow(run: Followed, sinks: list[Sink], troubles: list[str]) -> int:
    """Logs rows while the stage runs; returns its status, or 137 where the launcher ended without a word."""
    told: Queue[int] = Queue()

    def listen() -> None:
        said = sys.stdin.readline()
        told.put(json.loads(said)["status"] if said else KILLED)

    Thread(target=listen, daemon=True).start()
    while True:
        try:
            status = told.get(timeout=POLL)
        except Empty:
            status = None
        rows = live_rows(Path(run.scratch))
        for sink in sinks[:]:
            if attempt(troubles, lambda: sink.rows(rows) or True) is None:
                sinks.remove(sink)
        if status is not None:
            return status


def attempt(troubles: list[str], what: Callable[[], Any]) -> Any:
    """What it returns, or None after noting in one sentence why not: tracking is no reason for anything to fail."""
    try:
        return what()
    except InputError as error:
        troubles.append(str(error))
    except OSError as error:
        where = f" at {error.filename}" if error.filename else f" in {WANDB}/ or {EVENTS}/"
        troubles.append(f"not tracked: {error.strerror}{where}")
    except Exception as error:
        said = str(error).strip().splitlines() or ["no more is known"]
        troubles.append(f"not tracked: {type(error).__name__}: {said[0]}")
    return None


def live_rows(scratch: Path) -> dict[int, Figures]:
    """A running stage's rows so far: those that it writes as it logs them, else those that its newest checkpoint holds."""
    curve = Curve()
    if (scratch / LIVE).is_file():
        for line in (scratch / LIVE).read_bytes().split(b"\n")[:-1]:  # what follows the last end of line is still being written
            row = json.loads(line)
            curve.add(row.pop("step"), **row)
        return curve.rows
    checkpoints = [path for path in scratch.glob("checkpoints/checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            logs = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError):  # half written, or just being removed
            continue
        for log in logs:
            curve.add_log(log["step"], log)
        break
    return curve.rows


def sample(predictions: list[dict[str, Any]], test: Path) -> list[list[Any]]:
    """Predictions at even distances as rows of COLUMNS, with their questions and gold answers where the test set is here."""
    gold = {row["id"]: row for row in read_rows(test)} if test.is_file() else {}
    every = max(1, -(-len(predictions) // SAMPLE))
    return [
        [
            row["id"], row.get("form") or row.get("prompt"), gold.get(row["id"], {}).get("question"), row["completion"],
            gold.get(row["id"], {}).get("answer"), row.get("answer"), row.get("correct"),
        ]
        for row in predictions[::every]
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
