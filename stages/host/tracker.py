"""The process that follows one stage: reads its rows as they come, and at its end all that it wrote, and logs them.

It is told of the run on stdin, and of its end; where stdin closes without that, the launcher was killed. It says on stdout,
in one line, what went wrong.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Protocol

from stages.harness.errors import InputError
from stages.host.run_files import Ended, Figures, live_rows
from stages.host.tracking import EVENTS, KILLED, WANDB, Followed, read_followed

POLL = 2.0  # seconds between two looks at a stage's scratch folder


class Sink(Protocol):
    """Where a run is logged. Any of it may raise; the others go on."""

    def rows(self, rows: dict[int, Figures]) -> None:
        """All rows so far, by step; those that it has are passed over."""

    def end(self, status: int, ended: Ended | None) -> None:
        """The run is over; `ended` is there where the stage ended well."""


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
    except ModuleNotFoundError as error:
        troubles.append(f"not tracked: {error.name} is not installed: run `make .venv`")
    except OSError as error:
        where = f" at {error.filename}" if error.filename else f" in {WANDB}/ or {EVENTS}/"
        troubles.append(f"not tracked: {error.strerror}{where}")
    except Exception as error:
        said = str(error).strip().splitlines() or ["no more is known"]
        troubles.append(f"not tracked: {type(error).__name__}: {said[0]}")
    return None


if __name__ == "__main__":
    sys.exit(main())
