"""Types the commands of a page as its reader would, and holds what they say to what the page shows."""

import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.documents import in_blocks
from tests.imports import ROOT
from tests.pipeline.test_launcher import environment

PATIENCE = 400  # seconds, for a queue to be worked off


def walk(folder: Path, page: str, section: str | None = None, *, instead: Mapping[str, str] | None = None,
         alike: Callable[[str], str] | None = None, type: Callable[..., str] | None = None, **more: str) -> dict[str, str]:
    """Types the commands of a page's or a section's blocks; each ends well and says what the page shows.

    `instead` has what is typed where the page has something else; a command of which nothing is left is left out. `alike`
    makes two lines equal that say the same. Returns what the last run of each command said.
    """  # fmt: skip
    words, before, type, alike = {}, "", type or typed, alike or bare
    for command in in_blocks(page, section):
        text, shown = command.text, "\n".join(command.shown)
        for there, here in (instead or {}).items():
            text, shown = text.replace(there, here), shown.replace(there, here)
        if text.startswith("cd "):
            folder = folder / text.removeprefix("cd ")
        elif text.startswith("export "):  # the shell of the commands that follow
            before += f"{text}; "
        if not text or text.startswith(("cd ", "export ")):
            continue
        words[command.text] = said = type(folder, before + text, **more)
        deadline = time.monotonic() + PATIENCE
        while text == "dvc queue status" and re.search("Queued|Running", said) and time.monotonic() < deadline:
            time.sleep(2)  # asking takes dvc a second of a core that the workers could use
            words[command.text] = said = type(folder, before + text, **more)
        lines = iter(map(alike, said.splitlines()))
        missing = [line for line in shown.splitlines() if not any(re.fullmatch(pattern(line, alike), other) for other in lines)]
        assert not missing, f"{command} said\n{said}\nwithout, or in another order,\n" + "\n".join(missing)
    assert words
    return words


def typed(folder: Path, command: str, status: int = 0, **more: str) -> str:
    """What a command says, through a file: a pipe would be held open by the workers that a queue starts."""
    ours = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # this tree's `mathmind`, whichever is installed
    how = {"cwd": folder, "env": environment(PYTHONUNBUFFERED="1", PYTHONPATH=ours, **more), "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryFile("w+") as file:
        done = subprocess.run(["bash", "-c", command], stdout=file, **how)
        file.seek(0)
        said = file.read()
    assert done.returncode == status, f"{command} ended with {done.returncode} and said\n{said}"
    return said


def typed_at_a_terminal(folder: Path, command: str, **more: str) -> str:
    """What a command says where it finds itself at a terminal, without colours."""
    return typed(folder, f"TERM=dumb COLUMNS=100 script --quiet --return --command {shlex.quote(command)} /dev/null", **more)


def bare(line: str) -> str:
    """A line without what differs from run to run: numbers, hashes, times of day, the width of columns."""
    return single(re.sub(r"\b[0-9a-f]{7,}\b|-?\d[\d.:,]*( [AP]M)?", "#", line))


def single(line: str) -> str:
    """A line whose words stand one space apart: with its figures."""
    return " ".join(line.split())


def pattern(line: str, alike: Callable[[str], str]) -> str:
    return re.escape(alike(line)).replace(re.escape("..."), ".*")
