"""docker/run's other half: runs one stage so that a half-written out never exists.

The stage writes below a scratch folder named by what the run is made of, so that a killed run finds its checkpoints
again and a changed parameter never does. After exit 0 the outs move into place, the timing record is written beside
them, and the scratch folder goes.
"""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from select import select
from threading import Thread
from types import FrameType
from typing import IO, Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.params import Images, Run, read_params, section
from stages.harness.processes import die_with_parent
from stages.harness.run_stage import RECORD
from stages.host import provenance
from stages.host.cache import hold_inputs_to_the_lock
from stages.host.engines import TOGETHER, Job, engine, hub_stages, spreads
from stages.host.gpus import free_gpus, memory_gib
from stages.host.graph import GraphStage, lock_stages, read_graph, working_key
from stages.host.tracking import Tracking, followed, tracked

NODE = "MATHMIND_NODE"  # this machine's place among those that run a stage together: `mathmind join` sets it
GRACE = 10  # seconds between a signal that is handed on and the end of what does not heed it


def main() -> int:
    """Runs the stage that dvc.yaml's command names and returns its exit status."""
    _die_with_callers()
    try:
        return _launch(sys.argv[1:])
    except InputError as error:
        print(f"docker/run: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"docker/run: {error.strerror} at {error.filename}: mend that and run again", file=sys.stderr)
        return 2


def _launch(arguments: list[str]) -> int:
    tree = Path.cwd()
    values = read_params(Path("params.yaml"))
    settings = section(Path("params.yaml"), values, "run", Run)
    images = section(Path("params.yaml"), values, "images", Images).model_dump()
    tracking = section(Path("params.yaml"), values, "tracking", Tracking)
    hold_to_sense(settings)
    node = int(os.environ.get(NODE, "0"))
    if not arguments or arguments[0] not in images:
        raise InputError(f"the first argument is a role, one of {', '.join(images)}, found {arguments[:1]}")

    graph = read_graph(tree, values)
    stage = _stage_of(arguments, graph)
    with dvc_at_rest(tree):
        entries = lock_stages(tree)
    hold_inputs_to_the_lock(tree, stage, graph, entries)
    warn_of_threads(stage.name, values)
    key = working_key(tree, stage, values, entries)
    main_tree = Path(os.environ.get("DVC_ROOT") or tree)
    scratch_root = Path(settings.scratch) if settings.scratch else main_tree / ".dvc" / "tmp" / "mathmind"
    apart = f"-{node}" if node else ""  # the machines may have one file system
    lock = scratch_root / stage.name / f"{key}{apart}.lock"
    job = Job(
        image=images[arguments[0]],
        stage=stage,
        arguments=tuple(arguments[1:]),
        settings=settings,
        tree=tree,
        main_tree=main_tree,
        local_files=main_tree / settings.local_files,
        scratch=scratch_root / stage.name / f"{key}{apart}",
        lock=lock,
        asks_hub=stage.name in hub_stages(values),
        spreads=spreads(stage.name, values),
        key=key,
        node=node,
    )

    job = replace(job, rollout_gpus=rollout_gpus(job, values))
    with ExitStack() as locks:
        locks.enter_context(locked(lock, f"docker/run: waiting for another run of {stage.name}"))
        if job.gpus_wanted:
            with locked(scratch_root / f"gpus{apart}.lock", "docker/run: waiting for its turn to take a GPU"):
                job = replace(job, gpus=locks.enter_context(free_gpus(scratch_root, job.gpus_wanted)))
        shutil.rmtree(job.scratch / "outs", ignore_errors=True)
        for folder in ("outs", "checkpoints", "tmp"):
            (job.scratch / folder).mkdir(parents=True, exist_ok=True)
        for folder in job.writable:
            folder.mkdir(parents=True, exist_ok=True)

        chosen = engine(job)
        run = followed(tracking, stage, key, values, role=arguments[0], tree=tree, home=main_tree, scratch=job.scratch)
        tracker = locks.enter_context(tracked(None if node else run))
        with chosen.tidied():
            status = _run(chosen.command(), chosen.environment())
        if status != 0:
            shutil.rmtree(job.scratch / "outs", ignore_errors=True)
            if sentence := chosen.explain(status):
                print(f"docker/run: {stage.name}: {sentence}", file=sys.stderr)
            tracker.status = status
            return status
        if node:
            shutil.rmtree(job.scratch)
            print(f"{stage.name}: the first machine has its outs", flush=True)
            return 0

        record = read_json(job.scratch / RECORD)
        _move_into_place({job.scratch / "outs" / out: tree / out for out in stage.outs})
        provenance.write_timing(
            tree, stage.name, job.image, key, settings, record, gpus=job.gpus, pinned=chosen.pinned, image_id=chosen.image_id
        )
        shutil.rmtree(job.scratch)
        tracker.status = 0
    print(f"{stage.name}: wrote {', '.join(stage.outs)} in {record['seconds']:.1f} s", flush=True)
    return 0


def hold_to_sense(settings: Run) -> None:
    """InputError where `run` asks for what cannot be."""
    if settings.nodes > 1 and not settings.rendezvous:
        raise InputError(f"params.yaml: run.nodes is {settings.nodes} and run.rendezvous is null: give the first machine's host:port")
    if settings.gpus and settings.processes and settings.processes > settings.gpus:
        raise InputError(f"params.yaml: run.processes is {settings.processes} and run.gpus {settings.gpus}: each process needs a GPU of its own")
    if settings.rollout_gpus and settings.rollout_gpus >= settings.gpus:
        raise InputError(f"params.yaml: run.rollout_gpus is {settings.rollout_gpus} and run.gpus {settings.gpus}: one GPU at least is to train")
    if settings.sharded and settings.nodes * (settings.processes or settings.gpus or 1) == 1:
        raise InputError("params.yaml: run.sharded is true and one process has nobody to share the base with: set it to null, or take more GPUs")


def warn_of_threads(stage: str, values: dict[str, Any]) -> None:
    """Says where llama.cpp gets more threads than there are cores: they wait for each other by spinning, and 20 s have become 360 (docs/gpu.md)."""
    threads, cores = values["eval_gguf"].get("threads"), len(os.sched_getaffinity(0))
    if stage.startswith("eval-gguf@") and isinstance(threads, int) and threads > cores:
        print(f"docker/run: eval_gguf.threads is {threads}, more than the stage's cores ({cores}): they hinder each other, lower it", file=sys.stderr)


def rollout_gpus(job: Job, values: dict[str, Any]) -> int:
    """How many of grpo's GPUs its engines have alone: as params.yaml says, or as the memory of the smallest of the GPUs allows."""
    settings = job.settings
    if job.stage.name != "grpo" or settings.gpus < 2:
        return 0
    if settings.rollout_gpus is not None:
        return settings.rollout_gpus
    from stages.training.rollouts_apart import planned_gpus

    paths = dict(zip(job.arguments[1::2], job.arguments[2::2], strict=True))
    return planned_gpus(values["grpo"], job.tree / paths["--base"], job.tree / paths["--adapter"], settings.gpus, memory_gib())


def join(name: str, node: int) -> None:
    """Becomes docker/run for a stage that the first machine runs, as another of the machines that train it together."""
    values = read_params(Path("params.yaml"))
    settings = section(Path("params.yaml"), values, "run", Run)
    hold_to_sense(settings)
    graph = read_graph(Path.cwd(), values)
    if name not in TOGETHER:
        raise InputError(f"{name} is not trained by several machines: {', '.join(TOGETHER)} are")
    if not 0 < node < settings.nodes:
        raise InputError(f"params.yaml: run.nodes is {settings.nodes}, the first machine among them, and place {node} is not of them: "
                         "say there how many train together, as on the first")  # fmt: skip
    os.environ[NODE] = str(node)
    command = shlex.split(graph[name].command)
    os.execv(command[0], command)


def _stage_of(arguments: list[str], graph: dict[str, GraphStage]) -> GraphStage:
    """The stage of dvc.yaml whose command this is."""
    wanted = ["docker/run", *arguments]
    for stage in graph.values():
        if shlex.split(stage.command) == wanted:
            return stage
    raise InputError(f"no stage of dvc.yaml has the command `{shlex.join(wanted)}`: run stages with `dvc repro STAGE`")


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command in its own process group, hands every signal on to it, and returns its status or 128 + signal."""
    child = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=partial(_begin_child, os.getpid()))

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has just ended: what it made counts
            os.killpg(child.pid, signal.SIGKILL if number == signal.SIGALRM else number)
        signal.alarm(GRACE)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, hand_on)
    try:
        status = child.wait()
    finally:
        signal.alarm(0)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # nothing that the stage started outlives it
    return 128 - status if status < 0 else status


def _begin_child(launcher: int) -> None:
    """What a stage's process does before it becomes one: a background shell's jobs ignore Ctrl-C, a stage must not."""
    die_with_parent(launcher)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _die_with_callers() -> None:
    """Ends with dvc, also where a shell stands between (dash stays for a command's time, bash does not) or this process is only starting.

    docker/run has told who called it, and who called that.
    """
    told = [int(number) for number in os.environ.get("MATHMIND_CALLERS", "").split()]
    die_with_parent(told[0] if told else os.getppid())
    if not told:  # no Linux, or a caller in another namespace
        return
    dvc = None
    try:
        if told[1] and b"\0-c\0" in Path(f"/proc/{told[0]}/cmdline").read_bytes():
            dvc = os.pidfd_open(told[1])
        orphaned = _is_adopted(os.getpid()) or dvc is not None and (_parent_of(told[0]) != told[1] or _is_adopted(told[0]))
    except OSError:
        orphaned = True
    if orphaned:
        sys.exit(128 + signal.SIGTERM)

    def watch() -> None:
        select([dvc], [], [])  # until it has ended
        os.kill(os.getpid(), signal.SIGTERM)

    if dvc is not None:
        Thread(target=watch, daemon=True).start()


def _is_adopted(pid: int) -> bool:
    """Is its parent of another session, and so not the one that started it?"""
    parent, session = _parent_of(pid), os.getsid(pid)
    return parent != 0 and session != pid and os.getsid(parent) != session


def _parent_of(pid: int) -> int:
    """By what follows a process's name in its state: its condition, its parent, ..."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def dvc_at_rest(tree: Path) -> Iterator[None]:
    """Until it ends no DVC writes dvc.lock, which it does in place: another may just have ended a stage beside this one."""
    path = tree / ".dvc/tmp/lock"  # DVC's own, which it holds except while a stage runs
    if not path.exists():
        yield
        return
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[IO[str]]:
    """Holds a lock file, and says that it is waiting where another process holds it; a child that inherits it holds it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _move_into_place(places: dict[Path, Path]) -> None:
    """Puts outs where dvc.yaml names them: all of them, or none and what was there stays.

    They first come to lie beside their places, on the tree's own file system, flushed to disk; only when all have done
    so does each replace what was there, in one rename.
    """
    beside = {place: place.with_name(f".{place.name}.incoming") for place in places.values()}
    try:
        for written, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            remove(beside[place])
            shutil.move(written, beside[place])
            _flush(beside[place])
    except (OSError, shutil.Error) as error:
        for path in beside.values():
            remove(path)
        if "No space left" in str(error):
            raise InputError(f"the disk is full where {place} belongs: free some space and run again; nothing that was "
                             "there before is lost") from None  # fmt: skip
        raise
    for place, path in beside.items():
        remove(place)
        path.rename(place)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def remove(path: Path) -> None:
    """Removes a file, a link or a folder; an absent one is passed over."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
