"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Literal

PLAIN_LINE_EVERY = 15.0  # seconds: enough to see life in a log, not enough to flood it
MB = 1_000_000  # as download pages count
Unit = Literal["steps", "bytes"]


@contextmanager
def progress(title: str, total: int, unit: Unit = "steps") -> Iterator[Callable[..., None]]:
    """Yields `advance(steps=1, **figures)`; figures such as loss=0.4 stand beside the bar or on the line.

    Bytes are shown as MB, with MB a second.
    """
    reporter = _bar if sys.stderr.isatty() and not parent_process() else _lines  # bars of several processes would write over each other
    with reporter(title, total, unit) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int, unit: Unit) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counted,
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, figures="")

        def advance(steps: int = 1, **figures: float) -> None:
            bar.update(task, advance=steps, **({"figures": _written(figures)} if figures else {}))

        yield advance


@contextmanager
def _lines(title: str, total: int, unit: Unit) -> Iterator[Callable[..., None]]:
    done, started = 0, time.monotonic()
    last = started

    def advance(steps: int = 1, **figures: float) -> None:
        nonlocal done, last
        done += steps
        if (now := time.monotonic()) - last >= PLAIN_LINE_EVERY:
            last = now
            amount = megabytes(done, now - started, total) if unit == "bytes" else f"{done} of {total}"
            print(f"{title}: {amount}  {_written(figures)}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def megabytes(done: int, seconds: float, total: int | None = None) -> str:
    """Bytes as `1.5 of 6.0 MB, 0.5 MB/s`, or without a total as `1.5 MB, 0.5 MB/s`."""
    of_all = "" if total is None else f" of {total / MB:.1f}"
    return f"{done / MB:.1f}{of_all} MB, {done / MB / max(seconds, 0.001):.1f} MB/s"


def _written(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
