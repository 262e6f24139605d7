"""`tracking:` in params.yaml: a stage is followed from outside, by a process of its own, and no stage knows of it.

So tracking shapes no bit, needs no network where the stage runs, and serves every engine. What goes wrong with it costs one
line on stderr, and after a stage's end at most RECORDED or SENT seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.harness.errors import InputError
from stages.harness.params import StageParams
from stages.host.graph import GraphStage

WANDB = Path("wandb")  # where the client and its own commands look
EVENTS = Path("results/tensorboard")
KILLED = 128 + signal.SIGKILL  # a run of whose end nothing is known
UPLOAD = 30  # seconds after a stage's end for what has not been sent as it came
RECORDED, SENT = 20, UPLOAD + 20  # seconds that a tracker has after its stage, offline and online; then it is ended


class Tracking(StageParams):
    """`tracking:`, where runs are logged; only the host reads it, and changing it re-runs nothing."""

    wandb: Literal["disabled", "offline", "online"]
    project: str
    tensorboard: bool


@dataclass(frozen=True)
class Followed:
    """One run of one stage, as the process that follows it is told of it."""

    stage: str
    key: str
    experiment: str  # its name, or the branch's or commit's where there is none
    wandb: Literal["disabled", "offline", "online"]
    project: str
    tensorboard: bool
    tree: str  # the working folder, which may be a temporary copy
    home: str  # the main repository, where what is recorded lies
    scratch: str
    outs: tuple[str, ...]
    role: str
    image: str
    profile: str
    params: dict[str, Any]  # the stage's sections of params.yaml


class Tracker:
    """What the launcher tells of the run's end, which counts as killed until it is known."""

    status = KILLED


@contextmanager
def tracked(run: Followed | None) -> Iterator[Tracker]:
    """Within it a process of its own follows the run; then it has its time to end, and nothing of it is left."""
    tracker = Tracker()
    process = _start(run) if run else None
    try:
        yield tracker
    finally:
        if process:
            _end(process, tracker.status, SENT if run.wandb == "online" else RECORDED)


def followed(
    settings: Tracking, stage: GraphStage, key: str, values: dict[str, Any], *, role: str, tree: Path, home: Path, scratch: Path
) -> Followed | None:
    """What a tracker is to know of a run that is about to start, or None where none is asked for."""
    if settings.wandb == "disabled" and not settings.tensorboard:
        return None
    return Followed(
        stage=stage.name, key=key, experiment=experiment(tree), **settings.model_dump(), tree=str(tree), home=str(home.resolve()),
        scratch=str(scratch), outs=stage.outs, role=role, image=values["images"][role], profile=values["profile"],
        params={name: values.get(name) for name in stage.params},
    )  # fmt: skip


def experiment(tree: Path) -> str:
    """The name that DVC gave the experiment, else the branch's, else the short commit's, else `unnamed`."""
    if name := os.environ.get("DVC_EXP_NAME"):
        return name
    for asked in (["symbolic-ref", "--quiet", "--short", "HEAD"], ["rev-parse", "--quiet", "--short", "HEAD"]):
        with suppress(OSError):  # no git
            found = subprocess.run(["git", *asked], cwd=tree, capture_output=True, text=True).stdout.strip()
            if found:
                return found
    return "unnamed"


def as_folder(name: str) -> str:
    """A name as that of one folder."""
    return re.sub(r"[^\w.+=@-]+", "-", name).strip(".-") or "unnamed"


def _start(run: Followed) -> subprocess.Popen | None:
    """Starts the process in a session of its own, as Ctrl-C is the stage's affair, and tells it what to follow."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "stages.host.tracker"], start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _tell(process, asdict(run))
    except OSError as error:
        warn(f"{run.stage} is not tracked: {error.strerror}")
        return None
    return process


def _tell(process: subprocess.Popen, what: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # it has ended before: its status says so
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()


def _end(process: subprocess.Popen, status: int, seconds: int) -> None:
    """Says how the stage ended, and passes on what the tracker has to say: at most one line. A signal ends the waiting alone."""

    def stop(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        _tell(process, {"status": status})
        said, _ = process.communicate(timeout=seconds)
        if said.strip():
            warn(said.strip().splitlines()[0])
        elif process.returncode:
            warn(f"tracking ended with {process.returncode} before it had finished: what it had recorded lies in {WANDB}/")
    except subprocess.TimeoutExpired:
        warn(f"tracking had not ended {seconds} s after the stage and was stopped: `mathmind sync` sends what it recorded")
    finally:
        stop()
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def warn(sentence: str) -> None:
    """The one line that tracking may cost."""
    print(f"docker/run: WARNING: {sentence}", file=sys.stderr, flush=True)


def read_followed(line: str) -> Followed:
    """What the launcher told."""
    try:
        told = json.loads(line)
    except json.JSONDecodeError:
        raise InputError("stages.host.tracker is started by docker/run alone") from None
    return Followed(**{**told, "outs": tuple(told["outs"])})
