"""Which GPUs a stage gets: as many as it asks for, of those that the caller lets be seen and no other run holds.

So parallel experiments take one GPU each, whichever is free, and wait only where none is.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from stages.harness.errors import InputError

LOOK_AGAIN = 0.5  # seconds between two looks for a free GPU


def seen_gpus(count: int, drivers: Iterable[str] | None = None) -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else the driver's own; as many as are asked for where nothing can tell.

    Raises InputError where fewer are seen than `count`.
    """
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        seen, by = [gpu.strip() for gpu in named.split(",")], f"CUDA_VISIBLE_DEVICES={named} names"
    else:
        seen, by = list(_identities() if drivers is None else drivers) or [str(number) for number in range(count)], "nvidia-smi shows"
    if len(seen) < count:
        raise InputError(f"params.yaml: run.gpus is {count}, and {by} {len(seen)}: lower it, or let more be seen")
    return seen


def times_seen(count: int) -> int:
    """How often so many GPUs go into those that are seen. Raises InputError where fewer are."""
    return len(seen_gpus(count)) // count


@contextmanager
def free_gpus(locks: Path, count: int) -> Iterator[list[str]]:
    """The first `count` free ones, held until the block ends; waits for them, and never holds some while it waits for more.

    A lock is named by the GPU's own identity, for numbers are a machine's, and in a cluster's job a job's: folders may be shared.
    """
    identities = _identities()
    files = {gpu: locks / f"gpu-{identities.get(gpu, gpu)}.lock" for gpu in seen_gpus(count, identities)}
    waiting = False
    while True:
        with ExitStack() as held:
            taken = []
            for gpu, file in files.items():
                if len(taken) < count and (lock := _taken(file)):
                    held.enter_context(lock)
                    taken.append(gpu)
            if len(taken) == count:
                yield taken
                return
        if not waiting:
            print(f"docker/run: waiting for {f'{count} GPUs' if count > 1 else 'a GPU'}: others hold {', '.join(files)}",
                  file=sys.stderr, flush=True)  # fmt: skip
            waiting = True
        time.sleep(LOOK_AGAIN)


def memory_gib() -> float:
    """What the smallest of the driver's GPUs has; infinity where nothing can tell."""
    return min((float(mib) for (mib,) in ask_driver("memory.total")), default=float("inf")) / 1024


def ask_driver(*fields: str) -> list[list[str]]:
    """What nvidia-smi tells of each GPU by these names of its, in the order of their slots; nothing without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    asked = subprocess.run(query, capture_output=True, text=True)
    return [line.split(", ") for line in asked.stdout.strip().splitlines()] if asked.returncode == 0 else []


def _taken(path: Path) -> IO[str] | None:
    """A lock file, locked until it is closed; None where another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _identities() -> dict[str, str]:
    """The driver's GPUs, number -> identity (GPU-8f3c...), in the order of their slots; none without a driver."""
    return dict(ask_driver("index", "uuid"))
