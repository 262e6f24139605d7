"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_LINE_EVERY = 15.0  # seconds: enough to see life in a log, not enough to flood it


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields `advance(steps=1, **figures)`; figures such as loss=0.4 stand beside the bar or on the line."""
    reporter = _bar if sys.stderr.isatty() else _lines
    with reporter(title, total) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[figures]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, figures="")

        def advance(steps: int = 1, **figures: float) -> None:
            bar.update(task, advance=steps, **({"figures": _written(figures)} if figures else {}))

        yield advance


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[..., None]]:
    done, last = 0, time.monotonic()

    def advance(steps: int = 1, **figures: float) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= PLAIN_LINE_EVERY:
            last = time.monotonic()
            print(f"{title}: {done} of {total}  {_written(figures)}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def _written(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
