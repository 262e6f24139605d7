"""Work on many rows spread over processes; the results come in the rows' order, so their number changes nothing."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

from stages.harness.processes import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 64  # rows handed to a process at once, where a row is little work
FEW = 512  # such rows from which starting processes pays

_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None  # what forked processes find without its being sent


def in_order(function: Callable[[Item], Result], rows: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Each row with function(row), by so many processes; `function` may be any callable, only its results are sent.

    The processes work ahead while the caller goes through the rows, and stop when it does.
    """
    return _spread(function, rows, workers if len(rows) >= FEW else 1, CHUNK, one_thread=False)


def side_by_side(function: Callable[[Item], Result], rows: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """The same where each row is seconds of work, for which libraries then get one thread in each process."""
    return _spread(function, rows, min(workers, len(rows)), 1, one_thread=True)


def _spread(
    function: Callable[[Item], Result], rows: Sequence[Item], workers: int, chunk: int, one_thread: bool
) -> Iterator[tuple[Item, Result]]:
    if workers < 2:
        yield from ((row, function(row)) for row in rows)
        return
    rows[0]  # what is read with the first row is then in every process, and not read by each
    with _forked(function, rows, workers, one_thread) as pool:
        parts = pool.imap(_part, [range(start, min(start + chunk, len(rows))) for start in range(0, len(rows), chunk)])
        yield from zip(rows, chain.from_iterable(parts), strict=True)


def _forked(function: Callable, rows: Sequence[Any], workers: int, one_thread: bool):
    global _work
    _work = (function, rows)
    gc.freeze()  # or each process would copy the memory whose counts its own collection touches
    try:
        return get_context("fork").Pool(workers, _begin, (os.getpid(), one_thread))
    finally:
        _work = None
        gc.unfreeze()


def _part(places: range) -> list[Any]:
    function, rows = _work
    return [function(rows[place]) for place in places]


def _begin(parent: int, one_thread: bool) -> None:
    """A worker has none of the threads of the process that forked it, and must not wait for them; nor for its handlers to end it."""
    die_with_parent(parent, by=signal.SIGKILL)
    if one_thread and (torch := sys.modules.get("torch")):
        torch.set_num_threads(1)
