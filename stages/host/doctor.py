"""`mathmind doctor`: is all here that the profile in params.yaml needs, and what mends it where not."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.corpus.sources_lock import Pinned, read_lock
from stages.harness.errors import InputError
from stages.harness.params import Run, read_params, section
from stages.host.engines import find_image, hub_stages, image_file
from stages.host.gpus import ask_driver
from stages.host.graph import parse_yaml
from stages.host.hub_sources import LOCK, HubSource, hub_sources, in_words
from stages.host.provenance import recipe

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What a profile asks of a machine, in GiB.

    embedded's and gsm8k-local's are measured (README, "What it took"), with room to spare, and so is scratch-gpu's GPU
    memory (docs/gpu.md). The others are counted from their weights: on disk the base, four merged models and five GGUF
    models of three forms, and DVC's cache of adapters.
    """

    gpu: int
    disk: int
    memory: int


NEEDS = {
    "embedded": Need(gpu=0, disk=1, memory=4),
    "gsm8k-local": Need(gpu=0, disk=1, memory=5),
    "scratch-gpu": Need(gpu=20, disk=10, memory=16),
    "report-t4": Need(gpu=15, disk=120, memory=12),
    "report-h200": Need(gpu=79, disk=120, memory=64),  # a card of 80 GB shows 79.6
}

# Asked of another Python: how what it has installed differs from the locks that are named to it.
DIFFERING = """import sys
from pathlib import Path
from stages.host.provenance import differing_versions
print(*(line for lock in sys.argv[1:] for line in differing_versions(Path(lock))), sep="\\n", end="")"""
NATIVELY = 'docker/install ../.venv/rollout rollout, then export MATHMIND_PYTHON="$PWD/.venv/rollout/bin/python"'


@dataclass(frozen=True)
class Finding:
    """One line of the screen. `missing` is what the chosen profile cannot do without; `note` is for other ways and profiles."""

    subject: str
    state: Literal["ok", "note", "missing"]
    found: str
    fix: str = ""


def examine(tree: Path) -> list[Finding]:
    """Looks at everything; InputError only where params.yaml itself cannot be read."""
    values = read_params(tree / "params.yaml")
    settings = section(Path("params.yaml"), values, "run", Run)
    images = sorted(set(values["images"].values()))
    gpus = _gpus()
    return [
        _dvcs_own_files(tree),
        _packages(tree, images, settings),
        *(_engine(name, settings) for name in ("docker", "podman")),
        *_apptainer(settings),
        *(_image(tree, name, settings) for name in images),
        *(_profile(name, need, values["profile"], settings.gpus, gpus, tree) for name, need in NEEDS.items()),
        _hub(values),
        *_sources(tree, values),
    ]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as plain mappings."""
    return [asdict(finding) for finding in findings]


def _dvcs_own_files(tree: Path) -> Finding:
    """The two files that DVC writes in place, so that a kill can cut them off (treeverse/dvc, issue 7615)."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA as check_lock
    from ruamel.yaml.error import YAMLError
    from voluptuous import Invalid

    checks = {"dvc.lock": lambda text: check_lock(parse_yaml(text)), ".dvc/tmp/rwlock": json.loads}
    mended_by = {"dvc.lock": "git checkout dvc.lock", ".dvc/tmp/rwlock": "rm .dvc/tmp/rwlock"}
    for name, check in checks.items():
        try:
            if (tree / name).is_file():
                check((tree / name).read_text(encoding="utf-8"))
        except (ValueError, YAMLError, Invalid):
            return Finding("DVC's own files", "missing", f"{name} is cut off: a dvc was killed as it wrote it", mended_by[name])
    return Finding("DVC's own files", "ok", "whole")


def _packages(tree: Path, images: list[str], settings: Run) -> Finding:
    """The packages of the Python that runs stages natively: $MATHMIND_PYTHON's, where it is set (docker/run)."""
    state = "missing" if settings.engine == "native" else "note"
    locks = [str(tree / f"docker/{image}.lock") for image in images if (tree / f"docker/{image}.lock").is_file()]
    python = os.environ.get("MATHMIND_PYTHON") or sys.executable
    try:
        asked = subprocess.run([python, "-c", DIFFERING, *locks], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    except OSError as error:
        return Finding("native packages", state, f"MATHMIND_PYTHON={python}: {error.strerror}", "set it to a Python, or unset it")
    if asked.returncode:
        return Finding("native packages", state, f"{python}: {asked.stderr.strip().splitlines()[-1]}", NATIVELY)
    if differing := asked.stdout.splitlines():
        fix = NATIVELY if "rollout" in images else "make .venv"
        return Finding("native packages", state, f"not pinned: {', '.join(differing[:3])}", fix)
    return Finding("native packages", "ok", f"as docker/{', '.join(images)}.lock pin them")


def _engine(name: str, settings: Run) -> Finding:
    state = "missing" if settings.engine == name else "note"
    if not shutil.which(name):
        return Finding(name, state, "not installed", f"install {name}, or set run.engine: native")
    asked = subprocess.run([name, "version", "--format", "{{.Client.Version}}"], capture_output=True, text=True)
    answers = subprocess.run([name, "info"], capture_output=True, text=True)
    if answers.returncode:
        why = (answers.stderr.strip().splitlines() or ["no answer"])[-1]
        return Finding(name, state, f"does not answer: {why}", "start its service, or join its group" if name == "docker" else "podman info")
    return Finding(name, "ok", asked.stdout.strip())


def _apptainer(settings: Run) -> list[Finding]:
    """A cluster's engine: spoken of where it is, or is asked for."""
    if shutil.which("apptainer"):
        return [Finding("apptainer", "ok", subprocess.run(["apptainer", "version"], capture_output=True, text=True).stdout.strip())]
    if settings.engine == "apptainer":
        return [Finding("apptainer", "missing", "not installed", "load the cluster's module of it, or set run.engine: native")]
    return []


def _image(tree: Path, image: str, settings: Run) -> Finding:
    subject = f"image {image}"
    if not (tree / f"docker/{image}.lock").is_file():
        return Finding(subject, "missing", f"no docker/{image}.lock", f"docker/lock {image}")
    if settings.engine == "apptainer":
        file = image_file(tree, image)
        if (tree / file).is_file():
            return Finding(subject, "ok", f"{file}, {(tree / file).stat().st_size / 1e9:.1f} GB")
        return Finding(subject, "missing", f"no {file}", f"apptainer build {file} docker-archive:{image}.tar")
    engines = [settings.engine] if settings.engine != "native" else [name for name in ("docker", "podman") if shutil.which(name)]
    for name in engines:
        try:
            if found := shutil.which(name) and find_image(shutil.which(name), tree, image):
                return Finding(subject, "ok", f"{recipe(tree, image)} in {name}, {found['Size'] / 1e9:.1f} GB")
        except InputError:  # the engine does not answer, which its own line says
            continue
    return Finding(subject, "note" if settings.engine == "native" else "missing", f"{recipe(tree, image)} is not built", f"docker/build {image}")


def _gpus() -> list[tuple[str, float]]:
    """Names and GiB of the GPUs that the driver shows; none without one."""
    return [(name, float(mib) / 1024) for name, mib in ask_driver("name", "memory.total")]


def _profile(name: str, need: Need, chosen: str, wanted_gpus: int, gpus: list[tuple[str, float]], tree: Path) -> Finding:
    state = "missing" if name == chosen else "note"
    free = shutil.disk_usage(tree).free / GIB  # of run.scratch's disk, a stage's outs leave for this one
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    largest = max((size for _, size in gpus), default=0.0)
    found = f"GPU {f'{gpus[0][0]}, {largest:.0f} GiB' if gpus else 'none'}; memory {memory:.0f} GiB; disk {free:.0f} GiB free"
    short = [
        f"{what} of {wanted} GiB"
        for what, wanted, here in (("a GPU", need.gpu, largest), ("memory", need.memory, memory), ("free disk", need.disk, free))
        if here < wanted
    ]
    if name == chosen and wanted_gpus > max(1, len(gpus)):
        short.append(f"{wanted_gpus} GPUs (run.gpus)")
    subject = f"profile {name}" + (" (chosen)" if name == chosen else "")
    return Finding(subject, state if short else "ok", found, f"needs {', '.join(short)}" if short else "")


def _hub(values: dict[str, Any]) -> Finding:
    from huggingface_hub import constants

    state = "missing" if hub_stages(values) else "note"
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN, which gated sources ask for"
    endpoint = constants.ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        if not isinstance(error, urllib.error.HTTPError):  # an answer all the same
            reason = getattr(error, "reason", error)
            return Finding("hub", state, f"{endpoint} is out of reach: {reason}; {token}", "mend the network or set HF_ENDPOINT")
    return Finding("hub", "ok", f"{endpoint} answers; {token}")


def _sources(tree: Path, values: dict[str, Any]) -> list[Finding]:
    """What the lock holds of each hub source of the profile."""
    sources = hub_sources(Path("params.yaml"), values)
    try:
        lock = read_lock(tree / LOCK)
    except InputError as error:
        return [Finding("sources", "missing" if sources else "note", str(error), "mathmind pin --all")]
    return [_source(source, source.pinned(lock)) for source in sources]


def _source(source: HubSource, pinned: Pinned | None) -> Finding:
    subject = f"source {source.name}"
    if pinned is None:
        return Finding(subject, "missing", f"{source} is not pinned", f"mathmind pin {source.name}")
    found = f"{source} at {pinned.commit[:12]}, {in_words(pinned)}"
    if pinned.gated and not os.environ.get("HF_TOKEN"):
        return Finding(subject, "missing", found, f"accept its terms at {source.repository.page} and set HF_TOKEN")
    return Finding(subject, "ok", found)
