"""An object in a process of its own, with GPUs of its own: made there, asked from here, and ended with whoever started it."""

import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.processes import die_with_parent

# What a rank's process is told (stages/harness/ranks.py). It is none of them: torch would look for their store, where nobody is.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
PATIENCE = 5.0  # seconds in which a process that has nothing more to do may end by itself


class Apart:
    """What `make(*arguments)` returns, in another process, which starts with what this one has imported forgotten.

    `make`, arguments, what is asked and what comes back are pickled. Several may be asked before the first is waited for. What is noted
    there of the run's record (stages/harness/measures.py) is noted here with each answer.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, gpu: str | None = None, name: str = "process") -> None:
        """Returns at once; the first answer says whether it could be made. gpu: of CUDA_VISIBLE_DEVICES; name: in sentences about it."""
        self.name = name
        here, there = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=_serve, args=(there, os.getpid(), gc.get_threshold(), make, arguments), daemon=True)
        with _environment(gpu):
            self.process.start()
        there.close()
        self.pipe = here

    def ask(self, method: str, *arguments: Any, **options: Any) -> None:
        """Has `method` called there, without waiting for what it returns."""
        try:
            self.pipe.send((method, arguments, options))
        except OSError:
            self._gone()

    def answer(self) -> Any:
        """What the first of the calls not yet answered returned.

        Raises what it raised if that is an InputError, else RuntimeError, also where the process has ended.
        """
        try:
            failed, value, noted = self.pipe.recv()
        except (EOFError, OSError):
            self._gone()
        measures.note(**noted)
        if isinstance(value, InputError):
            raise value
        if failed:
            raise RuntimeError(f"the {self.name} failed:\n{value}")
        return value

    def close(self) -> None:
        """Ends the process, at work or not."""
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def _gone(self) -> None:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        how = f"was killed ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with status {code}"
        raise RuntimeError(f"the {self.name} {how} before it had answered") from None


def answers(asked: Sequence[Apart]) -> list[Any]:
    """What each one's first call not yet answered returned, in their order.

    Raises what the first to fail does, at once though others are at work; then all have ended.
    """
    waiting, found = {each.pipe: each for each in asked}, {}
    try:
        while waiting:
            for pipe in wait(list(waiting)):
                found[pipe] = waiting.pop(pipe).answer()
    except BaseException:
        for each in asked:
            each.close()
        raise
    return [found[each.pipe] for each in asked]


@contextmanager
def _environment(gpu: str | None) -> Iterator[None]:
    """What the new process is to find: a process alone, that sees its own GPU."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(OF_RANKS):
            del os.environ[name]
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _serve(pipe: Connection, parent: int, garbage: tuple[int, int, int], make: Callable[..., Any], arguments: tuple) -> None:
    """Answers until nobody can ask any more; `garbage`: when the parent searches for cycles."""
    die_with_parent(parent, by=signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to heed
    gc.set_threshold(*garbage)
    made: Any = None
    while True:
        try:
            method, asked, options = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # nothing is left to write; taking torch apart would cost seconds
        try:
            if made is None:
                made = make(*arguments)
            answer = False, getattr(made, method)(*asked, **options)
        except InputError as error:
            answer = True, error
        except Exception:
            answer = True, traceback.format_exc()
        measures.note_peaks()
        pipe.send((*answer, measures.noted()))
