"""Run inside a new image, before it gets its tag: `python self_test.py IMAGE.lock IMAGE.in`, both beside this file.

Every package of the lock is there in the lock's version and nothing else is; every direct need imports; where the
engine shows a GPU, torch can use it.
"""

import importlib
import re
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: Path) -> dict[str, set[str]]:
    """Names and the versions that a requirements file gives them (a universal lock may give one name two)."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(plain(name), set()).add(version)
    return found


def main(lock: Path, direct: Path) -> int:
    locked = named(lock) | {"pip": set(), "setuptools": set(), "uv": set()}  # what made the environment
    installed = {plain(dist.name): dist.version for dist in distributions()}
    wrong = [f"{name} {version}" for name, version in installed.items() if locked.get(name) != set() and version not in locked.get(name, set())]
    modules = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(plain(name), []).append(module)
    for name in named(direct):
        if name not in installed:
            wrong.append(f"{name} is missing")
            continue
        # sentencepiece lists its files as if they were modules: `sentencepiece/__init__`.
        for module in [module for module in modules.get(name, []) if module.isidentifier() and not module.startswith("_")]:
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever it is, the image is not fit
                wrong.append(f"import {module}: {type(error).__name__}: {error}")
    if Path("/dev/nvidia0").exists() and "torch" in installed:
        import torch

        if torch.version.cuda and not torch.cuda.is_available():
            wrong.append("torch sees no GPU, though /dev/nvidia0 is there")
    print("\n".join(wrong) or f"{len(installed)} packages, Python {sys.version.split()[0]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*(Path(__file__).with_name(name) for name in sys.argv[1:3])))
