"""`mathmind repro`: `dvc repro`, with stages that do not need each other side by side.

DVC brings one stage after another up to date. Here each of some workers has DVC do so with a single one, of those whose
inputs are made; the one with the longest way to the end comes first, by the seconds that results/timing/ has of the last runs.
A worker keeps to its share of the cores, for the threads of two stages would wait for each other on the same ones.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.params import Run, read_params, section
from stages.harness.processes import die_with_parent
from stages.host.gpus import times_seen
from stages.host.provenance import read_timing

AT_ONCE = 2  # stages on CPUs, unless more are asked for: each takes memory as if it ran alone


def at_once() -> int:
    """How many stages run side by side unless told: as often as the profile's GPUs go into those that are seen; on CPUs two."""
    gpus = section(Path("params.yaml"), read_params(Path("params.yaml")), "run", Run).gpus
    return times_seen(gpus) if gpus else min(AT_ONCE, len(os.sched_getaffinity(0)))


def reproduce(jobs: int) -> list[str]:
    """Brings the graph of the current folder up to date, `jobs` stages at a time; returns a sentence of each stage that failed.

    After a failure nothing more is started, and what runs comes to its end. A KeyboardInterrupt ends what runs, and is raised.
    """
    needs = _to_do()
    if not needs:
        print("Data and pipelines are up to date.")
        return []
    ways = _longest_ways(needs)
    shares = shares_of_cores(jobs)
    failures: list[str] = []
    running: dict[Future[str | None], tuple[str, set[int]]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, [os.getpid()]) as workers, _ended_by_ctrl_c():
        while True:
            ready = sorted((name for name in needs if not needs[name]), key=ways.__getitem__, reverse=True)
            if not failures:
                for name in ready[: len(shares)]:
                    alone = not running and len(ready) == 1  # and nothing is ready before it has ended
                    share = shares.pop()
                    del needs[name]
                    running[workers.submit(_bring, name, os.sched_getaffinity(0) if alone else share)] = name, share
            if not running:
                return failures
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, share = running.pop(future)
                shares.append(share)
                if failure := _failure(name, future):
                    failures.append(failure)
                    continue
                for others in needs.values():
                    others.discard(name)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ends the workers at a KeyboardInterrupt, and with them their stages: a terminal tells those too, `kill -INT` does not."""
    try:
        yield
    except KeyboardInterrupt:
        for worker in active_children():
            worker.terminate()
        raise


def shares_of_cores(count: int) -> list[set[int]]:
    """This process's cores in so many shares, the most last; all of them for a share that would have none."""
    cores = sorted(os.sched_getaffinity(0))
    bounds = [place * len(cores) // count for place in range(count + 1)]
    return [{*cores[first:last]} or {*cores} for first, last in pairwise(bounds)]


def _to_do() -> dict[str, set[str]]:
    """The stages that DVC finds changed and all that follow from them, each with those of them that it needs."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(_wait_for_lock=True) as repo, lock_repo(repo):  # or it would read dvc.yaml and dvc.lock once more for its status
            graph = repo.index.graph
            needs = {stage.addressing: {other.addressing for other in graph[stage]} for stage in graph}
            asked = set(repo.status()) & set(needs)
    except DvcException as error:
        raise InputError(_said(error)) from None
    while following := {name for name, others in needs.items() if others & asked} - asked:
        asked |= following
    return {name: needs[name] & asked for name in needs if name in asked}


def _longest_ways(needs: dict[str, set[str]]) -> dict[str, float]:
    """For each stage the seconds until the last of what follows from it has ended, if nothing waits; by the last runs' records."""

    @cache
    def way(name: str) -> float:
        return read_timing(Path(), name).get("seconds", 0) + max((way(other) for other in needs if name in needs[other]), default=0)

    return {name: way(name) for name in needs}


def _failure(name: str, future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return f"{name}: a worker was killed, perhaps for want of memory: run again, with fewer --jobs"


def _begin(starter: int) -> None:
    """What a worker does first. Its stages see no terminal, on which their bars would write over each other."""
    die_with_parent(starter)
    signal.signal(signal.SIGINT, lambda *_: None)  # the first process ends it
    for number in (1, 2):
        through = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=number, process_group=0)
        os.dup2(through.stdin.fileno(), number)


def _bring(name: str, cores: set[int]) -> str | None:
    """Has DVC bring one stage up to date, on these cores; returns what went wrong."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    os.sched_setaffinity(0, cores)
    try:
        with Repo(_wait_for_lock=True) as repo:
            repo.scm_context.quiet = True  # what to add to git it would say after each stage
            repo.reproduce(name, single_item=True)
    except (DvcException, OSError) as error:  # the latter from a full disk
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return f"{error}: {error.__cause__}" if error.__cause__ else str(error)
