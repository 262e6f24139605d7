"""`mathmind audit`: what stages really opened, held to what dvc.yaml declares.

With MATHMIND_TRACE=FOLDER in the environment the native engine runs each stage under strace, which sees what C and Rust code opens
as well. A stage may read its deps, params.yaml, and what is part of an image (Python, its packages, the system); it may write
below its scratch folder alone. Anything else would be an input that DVC knows nothing of, or an out that is not whole or nothing.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import source_from_cache
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.params import read_params
from stages.host.graph import GraphStage, read_graph

SYSTEM = tuple(map(Path, ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/opt/mathmind")))
WRITABLE = tuple(map(Path, ("/dev", "/proc/self")))
# Calls that open a file, and calls that change what lies at their paths; no others are traced, for importing asks 70,000 times what is there.
OPENING = ("open", "openat", "openat2", "creat")
CHANGING = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "truncate", "link", "linkat", "symlink",
            "symlinkat", "chmod", "fchmodat")  # fmt: skip
# `openat(AT_FDCWD</tree>, "data/raw", O_RDONLY|O_CLOEXEC) = 3</tree/data/raw>`, as strace --decode-fds writes it
OPENED = re.compile(rf'^(?:{"|".join(OPENING)})\((.*)\) += \d+<((?:[^>\\]|\\.)+)>')
CHANGED = re.compile(rf"^(?:{'|'.join(CHANGING)})\((.*)\) += 0$")
# Each path as it is written, below the folder that stands before it.
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"')
WRITES = ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC")


@dataclass(frozen=True)
class Opened:
    """A file that a stage should not have touched."""

    stage: str
    path: str  # below the working folder, or absolute
    written: bool


def traced(command: list[str], folder: str, stage: str) -> list[str]:
    """The command under strace, which writes a file a thread, FOLDER/STAGE.<thread>."""
    return ["strace", "--follow-forks", "--output-separately", "--seccomp-bpf", "--decode-fds=path", "--string-limit=4096",
            "--quiet=all", f"--trace={','.join((*OPENING, *CHANGING))}", "--output", str(Path(folder) / stage), *command]  # fmt: skip


def audit(tree: Path, traces: Path) -> tuple[dict[str, bool], list[Opened]]:
    """Of each stage whether it was traced, and what those should not have touched. Raises InputError where there is no trace."""
    graph = read_graph(tree, read_params(tree / "params.yaml"))
    found: dict[str, list[Path]] = {}
    for file in sorted(traces.iterdir()) if traces.is_dir() else ():
        found.setdefault(file.stem, []).append(file)
    traced_stages = {name: name in found for name in graph}
    if not any(traced_stages.values()):
        raise InputError(f"{traces} holds no trace of a stage: run `MATHMIND_TRACE={traces.absolute()} dvc repro` with the native engine first")
    seen = (name for name, was in traced_stages.items() if was)
    return traced_stages, [opened for name in seen for opened in _undeclared(tree.resolve(), graph[name], found[name])]


def _undeclared(tree: Path, stage: GraphStage, files: list[Path]) -> list[Opened]:
    scratch = tree / ".dvc" / "tmp" / "mathmind" / stage.name
    declared = [tree / path for path in (*stage.deps, "params.yaml")]
    image = [*SYSTEM, *(Path(place).resolve() for place in {sys.prefix, sys.base_prefix})]
    touched = dict.fromkeys(pair for file in files for pair in _touched(file, tree))
    wrong = []
    for path, written in touched:
        if path.is_relative_to(scratch) or (path.is_dir() and not written):
            continue
        allowed = WRITABLE if written else (*declared, *image)
        ours = path.parent.name == "__pycache__" and path.is_relative_to(tree / "stages") and not written
        source = Path(source_from_cache(path)) if ours else path  # bytecode stands for its source
        if any(source.is_relative_to(place) for place in allowed) or (not written and _is_of_a_package(source, tree)):
            continue
        wrong.append(Opened(stage.name, str(path.relative_to(tree) if path.is_relative_to(tree) else path), written))
    return wrong


def _is_of_a_package(path: Path, tree: Path) -> bool:
    """Python's marks of a package of ours, which are empty (a test holds them to that)."""
    return path.is_relative_to(tree / "stages") and path.name == "__init__.py"


def _touched(trace: Path, tree: Path) -> Iterator[tuple[Path, bool]]:
    """Every path that was opened, and whether to write; and every path that was changed in another way."""
    for line in trace.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if opened := OPENED.match(line):
            yield Path(_plain(opened[2])), any(flag in opened[1] for flag in WRITES) or line.startswith("creat")
        elif changed := CHANGED.match(line):
            for folder, path in PATH.findall(changed[1]):
                yield Path(os.path.normpath(tree / _plain(folder) / _plain(path))), True


def _plain(text: str) -> str:
    r"""strace writes `\"` and octal bytes such as `\303`."""
    return os.fsdecode(text.encode("latin-1", "surrogateescape").decode("unicode_escape").encode("latin-1"))
