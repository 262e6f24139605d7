"""Work on many rows spread over processes; the results come in the rows' order, so their number changes nothing."""

import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 64  # rows handed to a process at once
FEW = 512  # rows from which starting processes pays

_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None  # what forked processes find without its being sent


def in_order(function: Callable[[Item], Result], rows: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Each row with function(row), by so many processes; `function` may be any callable, only its results are sent.

    The processes work ahead while the caller goes through the rows, and stop when it does.
    """
    if workers < 2 or len(rows) < FEW:
        yield from ((row, function(row)) for row in rows)
        return
    rows[0]  # what is read with the first row is then in every process, and not read by each
    with _forked(function, rows, workers) as pool:
        parts = pool.imap(_part, range(0, len(rows), CHUNK))
        yield from zip(rows, chain.from_iterable(parts), strict=True)


def _forked(function: Callable, rows: Sequence[Any], workers: int):
    global _work
    _work = (function, rows)
    gc.freeze()  # or each process would copy the memory whose counts its own collection touches
    try:
        return get_context("fork").Pool(workers)
    finally:
        _work = None
        gc.unfreeze()


def _part(start: int) -> list[Any]:
    function, rows = _work
    return [function(rows[place]) for place in range(start, min(start + CHUNK, len(rows)))]
