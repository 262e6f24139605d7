"""`mathmind queue`: works off DVC's queue in the foreground, as a job of a cluster or on a rented machine needs it.

`dvc queue start` returns at once and leaves workers behind, and an experiment that is killed has failed for good. Here the
command lives as long as the work; told to end, it ends what runs and queues it again, so that the next start goes on from
its checkpoints. DVC has no command for that: what starts a worker and puts an experiment back is its own parts (dvc 3.67,
docker/host.lock).
"""

import os
import signal
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from stages.harness.errors import InputError
from stages.harness.params import Run, read_params, section
from stages.host.gpus import times_seen
from stages.host.repro import shares_of_cores

if TYPE_CHECKING:
    from dvc.repo.experiments.queue.base import QueueEntry
    from dvc.repo.experiments.queue.celery import LocalCeleryQueue

LOOK_AGAIN = 1.0  # seconds between two looks at the queue
PATIENCE = 60  # seconds until a worker has noticed that its experiment was killed


class _Told(Exception):
    """A signal asks this process to end."""


def at_once(folder: Path) -> int:
    """How many experiments can run side by side: as often as the profile's GPUs go into those that are seen; on CPUs one."""
    settings = section(Path("params.yaml"), read_params(folder / "params.yaml"), "run", Run)
    return times_seen(settings.gpus) if settings.gpus else 1


def work_off(folder: Path, jobs: int) -> list[str]:
    """Runs what is queued, `jobs` at a time, until nothing is left; returns the names of those that failed meanwhile.

    A SIGTERM, SIGINT or SIGHUP ends and queues again what runs, and then this process, by that signal's status.
    """
    from dvc.repo import Repo

    def tell(number: int, frame: FrameType | None) -> None:
        raise _Told(number)

    with Repo(str(folder)) as repo:
        queue = repo.experiments.celery_queue
        workers = len(queue.worker_status())
        if not workers and (left := list(queue.iter_active())):  # by a machine that went down
            queue._mark_inactive_tasks_failure({entry: entry.stash_rev for entry in left})
            _put_back(queue, left)
        failed_before = {done.entry for done in queue.iter_failed()}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, tell)
        try:
            if _waiting(queue):
                starter = get_context("spawn").Process(target=_start_workers, args=(folder, workers, jobs))  # workers keep nothing of this process
                starter.start()
                starter.join()
                if starter.exitcode:
                    raise InputError("DVC's queue did not start: its own words stand above")
            while _waiting(queue):
                time.sleep(LOOK_AGAIN)
        except _Told as told:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _stop(queue)
            raise SystemExit(128 + told.args[0]) from None
        queue.celery.control.shutdown()  # workers end of themselves, except now and then one
        return sorted(done.entry.name or done.entry.stash_rev[:7] for done in queue.iter_failed() if done.entry not in failed_before)


def _start_workers(folder: Path, before: int, count: int) -> None:
    """As many of DVC's workers as there shall be, `before` of which there are; each, with all that it runs, on its share of the cores."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        for number, share in list(enumerate(shares_of_cores(count), 1))[before:]:
            os.sched_setaffinity(0, share)
            repo.experiments.celery_queue._spawn_worker(number)


def _waiting(queue: "LocalCeleryQueue") -> bool:
    return any(True for _ in queue.iter_queued()) or any(True for _ in queue.iter_active())


def _stop(queue: "LocalCeleryQueue") -> None:
    """Ends workers and their experiments, and queues those again."""
    running = list(queue.iter_active())
    queue.shutdown(kill=True)
    deadline = time.monotonic() + PATIENCE
    while any(True for _ in queue.iter_active()) and time.monotonic() < deadline:
        time.sleep(0.2)
    _put_back(queue, running)


def _put_back(queue: "LocalCeleryQueue", entries: Iterable["QueueEntry"]) -> None:
    """Makes experiments that were killed queued ones again: their commit in DVC's stash, their task in its broker."""
    from dvc.repo.experiments.queue.remove import remove_tasks
    from dvc.repo.experiments.queue.tasks import run_exp
    from dvc.repo.experiments.stash import ExpStash

    for entry in entries:
        remove_tasks(queue, [entry])
        queue.proc.remove(entry.stash_rev, force=True)
        message = ExpStash.format_message(entry.head_rev, entry.baseline_rev, entry.name, entry.branch)
        queue.scm.set_ref(queue.stash.ref, entry.stash_rev, message=f"commit: {message}")
        queue.celery.signature(run_exp.s(entry.asdict())).delay()
