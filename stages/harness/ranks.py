"""The processes that train one model together, in torch's words the ranks of a world: which of them this is, what they tell each other.

stages/harness/run_ranks.py starts them. The first alone writes what outlives the run; where there is one process, it is the first.
"""

import os
from datetime import timedelta
from typing import Any

from stages.harness.errors import InputError

RUN = "MATHMIND_RUN"  # the key of the run that a process was started for
STARTER = "MATHMIND_STARTER"  # the process that started it, with which it ends
SHARDED = "MATHMIND_SHARDED"  # run.sharded, where it says yes or no
LONGEST_WAIT = timedelta(minutes=30)  # for a rank that is at work alone: the first answers sft's validation questions


def rank() -> int:
    """This process's place among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes train together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's place among those of its machine: the GPU that it has."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many of them this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    return rank() == 0


def of_several_machines() -> bool:
    return size() > local_size()


def meet() -> None:
    """Joins the others, each on a GPU of its own where there are GPUs. Raises InputError where another run is met."""
    if size() == 1:
        return
    import torch
    from torch.distributed import init_process_group

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # it would say cpu:0, cpu:1, which torch.load takes for devices that it has not
    init_process_group("nccl" if gpu else "gloo", timeout=LONGEST_WAIT)
    own = os.environ.get(RUN, "")
    if len(set(everybody(own))) > 1:
        raise InputError(f"machines met that do not run the same: process {rank()} has the run {own}, the first {told(own)}: "
                         "bring commit, params.yaml, dvc.lock and inputs of all machines to the same state")  # fmt: skip


def told(value: Any) -> Any:
    """What the first process says; all must ask."""
    if size() == 1:
        return value
    from torch.distributed import broadcast_object_list

    said = [value]
    broadcast_object_list(said, src=0)
    return said[0]


def everybody(value: Any) -> list[Any]:
    """What each process says, in their order; all must ask."""
    if size() == 1:
        return [value]
    from torch.distributed import all_gather_object

    said = [None] * size()
    all_gather_object(said, value)
    return said
