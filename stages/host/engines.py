"""How a stage's process starts, natively or in a container, and how nothing of it is left behind.

A container sees the working folder read-only at its own path, the scratch folder alone is writable, there is no network
but for what fetches from the hub, and its environment is docker/determinism.env and little more.
"""

import csv
import fcntl
import io
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.harness.errors import InputError
from stages.harness.params import Run
from stages.harness.ranks import SHARDED
from stages.harness.run_stage import determinism
from stages.host import provenance
from stages.host.audit import traced
from stages.host.graph import GraphStage
from stages.host.hub_sources import hub_sources

NATIVE_PASSES_ON = ("PATH", "LD_LIBRARY_PATH", "TERM", "COLUMNS")
HUB_PASSES_ON = ("HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")  # by name: never on a command line
LOCK_LABEL, BASE_LABEL, RECIPE_LABEL = "mathmind.lock", "org.opencontainers.image.base.name", "org.opencontainers.image.version"
IMAGE_FILES = Path("docker/images")  # apptainer's, below the main repository; git-ignored
# apptainer changes its credentials, and the kernel then forgets that it shall end with its parent: a shell in its group does not.
ENDS_TOGETHER = 'trap "kill -KILL 0" INT TERM HUP; "$@" & wait $!'
TOGETHER = ("base-model", "sft", "qlora", "grpo", "orpo")  # stages that several processes train together
BETWEEN_MACHINES = ("GLOO_", "NCCL_")  # the caller's variables of these names say which network processes talk over
PLENTY = 32768  # files and processes of a stage


@dataclass(frozen=True)
class Job:
    """One run of one stage: everything an engine needs to start it."""

    image: str
    stage: GraphStage
    arguments: tuple[str, ...]  # the stage's name, then --name PATH pairs as dvc.yaml gives them
    settings: Run
    tree: Path  # the working folder: the repository, or the copy that `dvc exp run --temp` made
    main_tree: Path  # the repository
    local_files: Path
    scratch: Path
    lock: Path  # held by the launcher for as long as it lives
    asks_hub: bool  # fetch and base-model, where a parameter names a source on the hub
    spreads: bool = False  # its one process has an engine on each GPU (stages/inference/spread.py)
    gpus: Sequence[str] = ()  # those that the launcher holds for it: a trainer would spread its batches over all that it sees
    key: str = ""  # of the run
    node: int = 0  # this machine's place among those that run it
    rollout_gpus: int = 0  # of those wanted, the last ones, which grpo's engines have alone

    def command(self, python: str) -> list[str]:
        """The stage's own command, its outs turned into the scratch folder."""
        name, *pairs = self.arguments
        command = [python, "-m", "stages.harness.run_stage", name, "--scratch", str(self.scratch)]
        if self.is_parallel:
            settings = self.settings
            apart = ["--nodes", str(settings.nodes), "--node", str(self.node), "--rendezvous", settings.rendezvous] if self.of_several_machines else []
            command[2:3] = ["stages.harness.run_ranks", "--processes", str(self.processes), "--run", self.key, *apart]
        for option, path in zip(pairs[::2], pairs[1::2]):
            command += [option, str(self.scratch / "outs" / path) if option.startswith("--out") else path]
        return [*command, "--local-files", str(self.local_files)]

    def environment(self) -> dict[str, str]:
        """What every engine gives a stage, and all that a container gets but for the hub's variables."""
        folder = str(self.scratch / "tmp")
        given = {"HOME": folder, "TMPDIR": folder, "USER": "mathmind", "PYTHONUNBUFFERED": "1"}
        if self.settings.workers:
            given["MATHMIND_WORKERS"] = str(self.settings.workers)
        # As a container numbers those that it has. None: a profile that asks for no GPU gives the same bits where there is one.
        given["CUDA_VISIBLE_DEVICES"] = ",".join(str(number) for number in range(len(self.gpus)))
        if self.settings.sharded is not None:
            given[SHARDED] = str(self.settings.sharded).lower()
        if self.settings.gpus == 0:
            given["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled on a CPU; loading the compiler takes a second
        else:
            given["TRITON_CACHE_DIR"] = str(self.kernels)
        if self.rollout_gpus:
            given["MATHMIND_ROLLOUT_GPUS"] = str(self.rollout_gpus)
        if self.of_several_machines:
            given |= {name: value for name, value in os.environ.items() if name.startswith(BETWEEN_MACHINES)}
        if self.asks_hub:
            given["HF_HUB_OFFLINE"] = "0"
        asked = determinism(self.tree)
        if self.settings.unpinned:
            given["MATHMIND_UNPINNED"] = "1"
            asked |= {name: os.environ[name] for name in asked if name in os.environ}
        return asked | given

    @property
    def kernels(self) -> Path:
        """Where stages on GPUs find what Triton compiled for those before them; it names it by source, options and compiler."""
        return self.scratch.parents[1] / "kernels" / f"{self.settings.engine}-{self.image}"

    @property
    def writable(self) -> list[Path]:
        """All that a stage may write to."""
        return [self.scratch, self.kernels] if self.settings.gpus else [self.scratch]

    @property
    def processes(self) -> int:
        """That this machine gives to the run, engines left out."""
        if self.stage.name not in TOGETHER:
            return 1
        asked = self.settings.processes or self.settings.gpus or 1
        return min(asked, self.settings.gpus - self.rollout_gpus) if self.rollout_gpus else asked

    @property
    def gpus_wanted(self) -> int:
        """All, where it spreads over them; else one a process, and those of grpo's engines."""
        return self.settings.gpus if self.spreads else min(self.settings.gpus, self.processes + self.rollout_gpus)

    @property
    def is_parallel(self) -> bool:
        return self.processes > 1 or self.of_several_machines

    @property
    def of_several_machines(self) -> bool:
        return self.stage.name in TOGETHER and self.settings.nodes > 1

    def hub_environment(self) -> dict[str, str]:
        """The caller's token, endpoint and proxies, for the stages that ask the hub; nothing for the others."""
        return {name: os.environ[name] for name in HUB_PASSES_ON if self.asks_hub and name in os.environ}


class Engine(Protocol):
    """Where a stage's process runs."""

    pinned: bool  # is everything that it runs with the lock's
    image_id: str | None

    def command(self) -> list[str]: ...

    def environment(self) -> dict[str, str]: ...

    def tidied(self) -> AbstractContextManager[None]:
        """Within it the command may run; after it, or after this process's death, nothing of it runs on."""

    def explain(self, status: int) -> str | None:
        """A sentence about an exit status of the engine's own; None where the stage has spoken for itself."""


def engine(job: Job) -> Engine:
    """The engine that `run.engine` names, with what it needs looked up: InputError where that is missing."""
    return {"native": Native, "apptainer": Apptainer}.get(job.settings.engine, Container)(job)


class Native:
    """This Python, which docker/run has chosen, in the working folder."""

    image_id = None

    def __init__(self, job: Job) -> None:
        self.job = job
        differing = provenance.differing_versions(job.tree / "docker" / f"{job.image}.lock")
        self.pinned = not differing
        if differing:
            some = ", ".join(differing[:3]) + (" ..." if len(differing) > 3 else "")
            print(f"docker/run: WARNING: {job.stage.name} runs with packages that docker/{job.image}.lock does not pin: "
                  f"{some}. Its bits may differ; `make .venv` installs the pinned ones.", file=sys.stderr)  # fmt: skip

    def command(self) -> list[str]:
        command = self.job.command(sys.executable)
        folder = os.environ.get("MATHMIND_TRACE")
        return traced(command, folder, self.job.stage.name) if folder else command

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in NATIVE_PASSES_ON if name in os.environ}
        return kept | self.job.environment() | on_gpus(self.job) | self.job.hub_environment()

    @contextmanager
    def tidied(self) -> Iterator[None]:
        yield

    def explain(self, status: int) -> str | None:
        return "the stage was killed (137): where the machine ran out of memory, its log says so" if status == 137 else None


class Container:
    """A container of the image whose tag is the recipe's hash, run by id; docker and podman alike."""

    def __init__(self, job: Job) -> None:
        self.job = job
        # Of this run alone: a killed run's keeper may still be removing what it kept when the next run has begun.
        self.name = f"mathmind-{job.stage.name.replace('@', '-')}-{secrets.token_hex(8)}"
        self.client = client(job.settings.engine)
        image = find_image(self.client, job.tree, job.image)
        if image is None:
            recipe = provenance.recipe(job.tree, job.image)
            raise InputError(f"image mathmind/{job.image}:{recipe} is not here: build it with `docker/build {job.image}`")
        self.image_id = image["Id"]
        self.pinned = stands_on_a_digest(job.image, image["Config"].get("Labels") or {})
        reap(self.client, own=job.lock)

    def command(self) -> list[str]:
        job = self.job
        options = [
            "--rm", "--init", "--pull", "never", "--name", self.name, "--hostname", "mathmind",
            "--label", f"{LOCK_LABEL}={job.lock}", "--log-driver", "none",
            "--read-only", "--workdir", str(job.tree),  # not even /tmp is writable: TMPDIR lies in the scratch folder
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--security-opt", "label=disable",
            *self._user(), *self._network(), *podmans_own(job.settings.engine),
        ]  # fmt: skip
        for folder in readable(job):
            options += ["--mount", _mount(folder, writable=False)]
        for folder in job.writable:
            options += ["--mount", _mount(folder, writable=True)]
        options += self._memory()
        if job.settings.gpus:
            options += ["--shm-size", "8g", *self._gpus()]
        for name, value in job.environment().items():
            options += ["--env", f"{name}={value}"]
        for name in job.hub_environment():
            options += ["--env", name]  # the engine's client reads the value from its own environment
        return [self.client, "run", *options, self.image_id, *self._share(), *job.command("python")]

    def environment(self) -> dict[str, str]:
        return dict(os.environ)  # the client's; none of it reaches the container

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """A keeper process of its own session removes the container when this process lets go of it, or is killed."""
        when_let_go = 'cat; for second in 1 2 3 4 5; do "$0" rm --force "$1"; sleep 1; done'
        keeper = subprocess.Popen(["sh", "-c", when_let_go, self.client, self.name], stdin=subprocess.PIPE,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            yield
        finally:
            subprocess.run([self.client, "rm", "--force", self.name], capture_output=True)
            keeper.kill()
            keeper.wait()

    def explain(self, status: int) -> str | None:
        engine, image = self.job.settings.engine, self.job.image
        return {
            125: f"{engine} could not start the container, or lost it: its own words stand above",
            126: f"the image has a `python` that cannot be run: build it anew with `docker/build --no-cache {image}`",
            127: f"the image has no `python`: build it anew with `docker/build --no-cache {image}`",
            137: "the container was killed (137), most often for want of memory: "
            + (f"raise run.memory, now {self.job.settings.memory}" if self.job.settings.memory else "free some"),
        }.get(status)

    def _user(self) -> list[str]:
        """The caller's own ids, so that outs are the caller's; a rootless engine maps them itself."""
        ids = f"{os.getuid()}:{os.getgid()}"
        if self.job.settings.engine == "podman":
            return ["--user", ids, *(["--userns", "keep-id"] if os.getuid() else [])]
        security = _ask(self.client, "info", "--format", "{{json .SecurityOptions}}")
        return ["--user", "0:0" if "rootless" in security else ids]

    def _network(self) -> list[str]:
        if self.job.of_several_machines:
            return ["--network", "host"]
        return [] if self.job.asks_hub else ["--network", "none"]

    def _share(self) -> list[str]:
        """Keeps the stage to the cores that this process has, where those are not all: docker's service starts it, which has them all."""
        cores = os.sched_getaffinity(0)
        return [] if len(cores) == os.cpu_count() else ["taskset", "--cpu-list", ",".join(map(str, sorted(cores)))]

    def _memory(self) -> list[str]:
        if not (limit := self.job.settings.memory):
            return []
        if _ask(self.client, "info", "--format", "{{.MemoryLimit}}").strip() == "false":  # podman says it itself
            print("docker/run: WARNING: run.memory is not held to: this docker has no control groups to limit memory with",
                  file=sys.stderr)  # fmt: skip
        return ["--memory", limit, "--memory-swap", limit]

    def _gpus(self) -> list[str]:
        if self.job.settings.engine == "podman":
            return [word for gpu in self.job.gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]
        return ["--gpus", f'"device={",".join(self.job.gpus)}"']


class Apptainer:
    """Docker's image turned into one file, for clusters that let nobody run docker: as closed, and with no service behind it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.client = client("apptainer")
        name = image_file(job.tree, job.image)
        self.image = job.main_tree / name
        if not self.image.is_file():
            raise InputError(f"{name} is missing: make it of docker's image, `apptainer build {name} docker-archive:{job.image}.tar` "
                             "(docs/clusters.md)")  # fmt: skip
        labels = image_file_labels(self.client, self.image)
        if labels.get(RECIPE_LABEL) != name.stem.removeprefix(f"{job.image}-"):
            raise InputError(f"{name} was made by recipe {labels.get(RECIPE_LABEL)}: make it anew of the image that it is named after")
        self.image_id = labels["org.label-schema.build-date"]  # it has no other name of its own that is quick to read
        self.pinned = stands_on_a_digest(job.image, labels)

    def command(self) -> list[str]:
        job = self.job
        options = ["--containall", "--cleanenv", "--no-eval", "--no-privs", "--no-mount", "tmp,hostfs,bind-paths",
                   "--home", f"{job.scratch}/tmp", "--pwd", str(job.tree)]  # fmt: skip
        options += [] if job.asks_hub or job.of_several_machines else ["--net", "--network", "none"]
        options += ["--memory", job.settings.memory] if job.settings.memory else []
        options += ["--nv"] if job.gpus else []
        for folder in readable(job):
            options += ["--mount", _mount(folder, writable=False)]
        for folder in job.writable:
            options += ["--mount", _mount(folder, writable=True)]
        return ["sh", "-c", ENDS_TOGETHER, "sh", self.client, "--quiet", "exec", *options, str(self.image), *job.command("python")]

    def environment(self) -> dict[str, str]:
        """The client's own, which it keeps from the container, and what is for the container, told by a prefix; HOME is --home's."""
        given = self.job.environment() | self.job.hub_environment() | on_gpus(self.job)
        return dict(os.environ) | {f"APPTAINERENV_{name}": value for name, value in given.items() if name != "HOME"}

    @contextmanager
    def tidied(self) -> Iterator[None]:
        yield  # the container's processes end with apptainer, and it with the shell that starts it

    def explain(self, status: int) -> str | None:
        return {
            255: "apptainer could not start the container, or the stage ended with 255: its own words stand above",
            137: "the stage was killed (137), most often for want of memory",
        }.get(status)


def readable(job: Job) -> list[Path]:
    """The working folder, DVC's cache where deps are links into it, and the user's own files where there are any."""
    folders = {job.tree, *_link_targets(job.tree, job.stage.deps)}
    if job.local_files.is_dir():
        folders.add(job.local_files)
    return sorted(folders)


def on_gpus(job: Job) -> dict[str, str]:
    """The variables that hold a process without a container of docker's to its GPUs, by nvidia-smi's numbers."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(job.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def stands_on_a_digest(image: str, labels: dict[str, str]) -> bool:
    """Whether an image's base is pinned; a warning where not."""
    pinned = "@sha256:" in labels.get(BASE_LABEL, "")
    if not pinned:
        print(f"docker/run: WARNING: image mathmind/{image} stands on {labels.get(BASE_LABEL)}, which no digest pins: "
              "its bits may differ elsewhere", file=sys.stderr)  # fmt: skip
    return pinned


def image_file(tree: Path, image: str) -> Path:
    """Where apptainer's form of an image lies, from the main repository."""
    return IMAGE_FILES / f"{image}-{provenance.recipe(tree, image)}.sif"


def image_file_labels(client: str, image: Path) -> dict[str, str]:
    """The labels of a SIF file: those of docker's image, and apptainer's own."""
    asked = subprocess.run([client, "inspect", "--json", str(image)], capture_output=True, text=True)
    if asked.returncode:
        raise InputError(f"apptainer cannot read {image}: {(asked.stderr.strip().splitlines() or ['no word'])[-1]}: make it anew")
    return json.loads(asked.stdout)["data"]["attributes"]["labels"]


def hub_stages(values: dict[str, Any]) -> set[str]:
    """The stages that need the network: only fetch and base-model ever do, and only where a parameter says `hub`."""
    return {source.stage for source in hub_sources(Path("params.yaml"), values)}


def spreads(stage: str, values: dict[str, Any]) -> bool:
    """Whether a stage's answers are the work of all GPUs: eval's, and preference-pairs' where vLLM draws them, each with its own seed."""
    pairs = values["preference_pairs"]
    return stage.startswith("eval@") or stage == "preference-pairs" and (pairs.get("origin"), pairs.get("engine")) == ("base", "vllm")


def client(engine: str) -> str:
    """The path of an engine's command, or InputError."""
    if found := shutil.which(engine):
        return found
    raise InputError(f"params.yaml: run.engine is {engine}, and there is no command of that name: install it, or use native")


def podmans_own(engine: str) -> list[str]:
    """podman would pass the caller's proxies on, put memory over /tmp, and raise limits that the caller may not raise."""
    if engine != "podman":
        return []
    options = ["--http-proxy=false", "--read-only-tmpfs=false"]
    for name, limit in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(limit)[1]
        allowed = PLENTY if hard == resource.RLIM_INFINITY else min(hard, PLENTY)
        options += ["--ulimit", f"{name}={allowed}:{allowed}"]
    return options


def find_image(client: str, tree: Path, image: str) -> dict[str, Any] | None:
    """What the engine knows of the image that this tree's recipe makes, or None where it was never built."""
    tag = f"mathmind/{image}:{provenance.recipe(tree, image)}"
    asked = subprocess.run([client, "image", "inspect", tag], capture_output=True, text=True)
    if asked.returncode == 0:
        return json.loads(asked.stdout)[0]
    if "no such image" in asked.stderr.lower() or "image not known" in asked.stderr.lower():
        return None
    raise InputError(f"{Path(client).name} does not answer: {asked.stderr.strip().splitlines()[-1]}")


def reap(client: str, own: Path) -> None:
    """Removes containers whose launcher is gone: nobody holds the lock that they are labelled with."""
    for container in _ask(client, "ps", "--all", "--quiet", "--filter", f"label={LOCK_LABEL}").split():
        lock = Path(_ask(client, "inspect", "--format", f'{{{{index .Config.Labels "{LOCK_LABEL}"}}}}', container).strip())
        if lock == own or _free(lock):
            _ask(client, "rm", "--force", container)


def _free(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or not ours to see
        return False
    return True


def _ask(client: str, *arguments: str) -> str:
    return subprocess.run([client, *arguments], capture_output=True, text=True).stdout


def _mount(folder: Path, *, writable: bool) -> str:
    """One --mount value: comma-separated fields, quoted as CSV, for a path may hold commas and spaces."""
    text = io.StringIO()
    fields = ["type=bind", f"source={folder}", f"target={folder}", *([] if writable else ["readonly"])]
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def _link_targets(tree: Path, deps: tuple[str, ...]) -> set[Path]:
    """Folders outside the tree that links among the deps lead to: `dvc config cache.type symlink` makes such links.

    Each is the grandparent of a target: DVC keeps a file in <cache>/files/md5/ab/cdef..., so there are one or two.
    """
    found = set()
    for dep in deps:
        path = tree / dep
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            if file.is_symlink() and not (target := file.resolve()).is_relative_to(tree):
                found.add(target.parents[1])
    return found
