"""Starts the processes of one machine that run a stage together, through torch's own launcher, and says which failed first.

`python -m stages.harness.run_ranks --processes 2 --run KEY STAGE --base ...` where docker/run would else start run_stage. Several
machines meet at --rendezvous, the first machine's host:port, each with its --node; when one fails or falls silent, all end. What the
first process says is shown as it comes; of another's nothing, unless it is the one that failed.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.machines import WAIT, Others, network
from stages.harness.ranks import RUN, STARTER


def main(arguments: list[str]) -> int:
    """Returns the stage's exit status, the first that was not 0, or 128 and a signal's number."""
    asked = _parse(arguments)
    try:
        talk_over = network(asked.rendezvous)
    except InputError as error:
        print(f"{asked.stage[0]}: {error}", file=sys.stderr)
        return 2
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # what torch's store says of itself; the processes do say what went wrong
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's own account of a failure stands before the one that tells what it was
    os.environ |= {RUN: asked.run, STARTER: str(os.getpid()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", talk_over)
    for number in (signal.SIGINT, signal.SIGHUP):  # a process in the midst of a sum heeds SIGTERM alone
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    logs = Path(asked.stage[asked.stage.index("--scratch") + 1]) / "ranks"
    shutil.rmtree(logs, ignore_errors=True)
    silent = {local: Std.ALL for local in range(asked.processes) if local or asked.node}
    config = LaunchConfig(
        min_nodes=asked.nodes,
        max_nodes=asked.nodes,
        nproc_per_node=asked.processes,
        run_id="mathmind",  # one for all runs: machines that hold to different ones are to meet, and to say so
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=silent),
        max_restarts=0,
        signals_to_handle="SIGTERM",
        **_rendezvous(asked),
    )
    others = Others(asked.stage[0], asked.rendezvous, asked.node, asked.nodes) if asked.nodes > 1 else None
    status = 1
    try:
        elastic_launch(config, sys.executable)("-m", "stages.harness.run_stage", *asked.stage)
        status = 0
    except ChildFailedError as error:
        status = _tell(asked, error, logs)
    except SignalException as error:
        status = 128 + error.sigval
    except (RendezvousError, TimeoutError, RuntimeError) as error:
        if asked.nodes == 1:
            raise
        status = 2
        print(f"{asked.stage[0]}: {asked.nodes} machines were to meet at {asked.rendezvous} and did not within {WAIT // 60} minutes "
              f"({str(error).splitlines()[0]}): start the stage on each of them, and see that the port can be reached", file=sys.stderr)  # fmt: skip
    finally:
        if others:
            others.tell(status)
    return status


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_ranks")
    parser.add_argument("--processes", type=int, required=True, help="of this machine")
    parser.add_argument("--run", default="", help="the key that all machines must have in common")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--rendezvous")
    parser.add_argument("stage", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def _rendezvous(asked: argparse.Namespace) -> dict:
    """Alone, a port that is free; else a fixed place of each machine in the order, for sums depend on it."""
    if asked.nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
    return {"rdzv_backend": "static", "rdzv_endpoint": asked.rendezvous, "rdzv_configs": {"rank": asked.node, "timeout": WAIT}}


def _tell(asked: argparse.Namespace, error, logs: Path) -> int:
    """Shows what the process of this machine said that failed first, and how it ended."""
    stage = asked.stage[0]
    rank, failure = error.get_first_failure()
    if failure.exitcode == 2 and 0 in error.failures and error.failures[0].exitcode == 2:  # what is wrong for all, the first has said
        return 2
    for said in sorted(logs.glob(f"*/attempt_0/{failure.local_rank}/std*.log")):
        sys.stderr.write(said.read_text(encoding="utf-8", errors="replace"))
    if failure.exitcode < 0:
        print(f"{stage}: process {rank} was killed ({failure.signal_name()}): the others ended with it", file=sys.stderr)
        return 128 - failure.exitcode
    if failure.exitcode != 2:
        print(f"{stage}: process {rank} failed first: the others ended with it", file=sys.stderr)
    return failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
