"""docs/notebook.ipynb, run without Jupyter: its cells in order, with a folder for the drive, and again after a disconnection.

The graph is made small, and an environment that is here stands for the cell that installs one.
"""

import ast
import json
import re
import subprocess
import sys

import pytest

from stages.host.graph import lock_stages
from tests.imports import ROOT
from tests.pipeline.reader import typed
from tests.pipeline.test_launcher import change, environment, git

NOTEBOOK = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
CELLS = [(("".join(cell["source"])), cell["metadata"].get("tags", [])) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHELL = "%%bash\n"


def as_script():
    """The cells as one program; a shell's cell is read by bash from its input, as IPython has it read."""
    lines = ["import subprocess"]
    for source, tags in CELLS:
        if "installation" in tags:
            continue
        shell = source.removeprefix(SHELL)
        lines.append(source if shell == source else f"subprocess.run(['bash'], input={shell!r}, text=True, check=True)")
    return "\n".join(lines)


def session(folder, script, address, drive):
    """Runs a program in a folder of its own, as on a machine that knows of the address and the drive alone; returns what it said."""
    folder.mkdir()
    settings = {"ADDRESS": str(address), "DRIVE": str(drive), "CLONE": str(folder / "clone"), "PROFILE": "embedded", "HOME": str(folder)}
    command = [sys.executable, "-u", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def drive(place, tmp_path):
    """A drive that holds what earlier sessions have saved: the small graph, all but what a changed parameter makes anew."""
    folder = tmp_path / "a drive"
    typed(place, f"dvc remote add --quiet --local --default drive '{folder}/dvc' && dvc push --quiet")
    change(place, grpo__lr=0.002)
    git(place, "commit", "-qam", "GRPO at twice the rate")
    return folder


def test_every_cell_parses_and_none_holds_an_output():
    for source, _ in CELLS:
        if source.startswith(SHELL):
            parsed = subprocess.run(["bash", "-n"], input=source.removeprefix(SHELL), capture_output=True, text=True)
            assert parsed.returncode == 0, parsed.stderr
        else:
            ast.parse(source)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in NOTEBOOK["cells"])
    assert [tags for _, tags in CELLS if tags] == [["installation"]]


def test_the_stages_after_which_it_saves_are_stages_of_the_graph_and_every_training_is_one():
    (listed,) = re.findall(r"for stage in (.*); do", as_script())
    assert set(listed.split()) <= set(lock_stages(ROOT))
    assert set(listed.split()) >= {"base-model", "sft", "qlora", "grpo", "orpo"}


def test_a_session_that_ends_loses_nothing_that_the_drive_has(place, drive, tmp_path):
    said = session(tmp_path / "first", as_script(), place, drive)
    assert "Running stage 'grpo'" in said and "Running stage 'qlora'" not in said and "# Results: profile `embedded`" in said
    assert not [path for path in (drive / "scratch").rglob("*") if path.is_file() and path.suffix != ".lock"]

    said = session(tmp_path / "second", as_script(), "an address that is not asked again", drive)
    assert "Running stage" not in said and "# Results: profile `embedded`" in said
    first, second = tmp_path / "first/clone", tmp_path / "second/clone"
    assert (second / "models/grpo/adapter_model.safetensors").is_file()
    assert git(first, "rev-parse", "HEAD") == git(second, "rev-parse", "HEAD") and git(second, "status", "--porcelain") == ""
