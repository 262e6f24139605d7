"""What ran, where and how long: results/timing/<stage>.json, apart from every out."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.harness.params import Run

TIMING = Path("results/timing")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "vllm", "llama-cpp-python")  # those that shape weights


def write_timing(
    tree: Path,
    stage: str,
    image: str,
    key: str,
    settings: Run,
    measured: dict[str, Any],
    *,
    gpus: list[str],
    pinned: bool,
    image_id: str | None,
) -> None:
    """Writes a stage's timing record; `measured` is what the stage's own process counted (seconds, MiB, tokens, Python).

    Its `level` is what is promised of the bits (README, "What is deterministic"): bitwise, unless the stage noted another.
    """
    if "tokens" in measured:
        measured = {**measured, "tokens_per_second": round(measured["tokens"] / max(measured["seconds"], 0.01))}
    write_json(tree / TIMING / f"{stage}.json", {
        "stage": stage,
        "key": key,
        "level": "bitwise",
        **measured,
        "engine": settings.engine,
        "cores": len(os.sched_getaffinity(0)),  # that it could run on
        "image": image,
        "image_id": image_id,
        "recipe": recipe(tree, image),
        "pinned": pinned and "unpinned" not in measured,
        "machine": machine(gpus),
    })  # fmt: skip


def read_timing(tree: Path, stage: str) -> dict[str, Any]:
    """A stage's timing record; nothing where there is none."""
    path = tree / TIMING / f"{stage}.json"
    return read_json(path) if path.is_file() else {}


def recipe_files(image: str) -> tuple[str, ...]:
    """All that decides an image, under docker/: the Dockerfile and what it copies."""
    return ("Dockerfile", "system-packages", "install", "torch_source", "uv.toml", "uv.lock", "tools.lock", f"{image}.lock")


def recipe(tree: Path, image: str) -> str:
    """A short hash of an image's recipe: its tag, and in the timing record."""
    return hashlib.sha256(b"".join((tree / "docker" / name).read_bytes() for name in recipe_files(image))).hexdigest()[:16]


def pins(lock: str) -> list[tuple[str, str]]:
    """The packages and versions in a lock's text, in its order; a package stands there again where platforms differ."""
    return re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock, re.MULTILINE)


def pinned_libraries(lock: str) -> dict[str, str]:
    """The versions that a lock's text pins of LIBRARIES, as far as it does."""
    pinned = _by_package(lock)
    return {name: " or ".join(sorted(pinned[name])) for name in LIBRARIES if name in pinned}


def lock_text(lock: Path) -> str:
    """A lock of docker/, or InputError where it is missing."""
    if not lock.is_file():
        raise InputError(f"{lock} is missing: write it with `docker/lock {lock.stem}`")
    return lock.read_text(encoding="utf-8")


def _by_package(lock: str) -> dict[str, set[str]]:
    pinned: dict[str, set[str]] = {}
    for name, version in pins(lock):
        pinned.setdefault(package_name(name), set()).add(version)
    return pinned


def package_name(name: str) -> str:
    """A package's name as every tool writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def differing_versions(lock: Path) -> list[str]:
    """Packages whose installed version is not the lock's, as `torch 2.12.0 (lock: 2.13.0)`.

    A package that the lock names and this Python has no need of (another platform's) is passed over.
    """
    pinned = _by_package(lock_text(lock))
    installed = dict(map(_installed, distributions()))
    return sorted(
        f"{name} {installed[name]} (lock: {' or '.join(sorted(versions))})"
        for name, versions in pinned.items()
        if name in installed and installed[name] not in versions
    )


def _installed(package: Distribution) -> tuple[str, str]:
    """Name and version, from the head of what a package says of itself: importlib would read all of it, twice, in ten times as long."""
    told = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    name, version = (re.search(rf"^{field}: *(.*)", told, re.MULTILINE) for field in ("Name", "Version"))
    return (package_name(name[1]), version[1]) if name and version else ("", "")  # a folder that a package's removal left


def machine(gpus: list[str]) -> dict[str, Any]:
    """The hardware as far as it can shape bits or speed, with these of its GPUs, never the host's name."""
    described: dict[str, Any] = {"architecture": platform.machine(), "cpu": platform.processor() or "unknown"}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        first = dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpuinfo.read_text().split("\n\n")[0], re.MULTILINE))
        described["cpu"] = first.get("model name", described["cpu"])
        described["cpu_flags"] = hashlib.sha256(first.get("flags", "").encode()).hexdigest()[:16]
    if gpus and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", f"--id={','.join(gpus)}"]
        described["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return described
