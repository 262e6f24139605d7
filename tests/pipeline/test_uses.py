"""docs/experiments.md, walked: each of its commands is run as it stands there, and says what stands there.

The whole graph is made small, as the tests of single stages make it.
"""

import re
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from stages.host.graph import hash_of, parse_yaml
from stages.host.plots_page import write_plots_page
from stages.host.seeds import experiments
from tests.imports import ROOT
from tests.pipeline.conftest import CHANGES
from tests.pipeline.test_launcher import change, copy_of_the_tree, end_queue_workers, environment, git

pytestmark = pytest.mark.xdist_group("uses")  # they share a graph of two minutes
GUIDE = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLER = {
    **CHANGES,
    "eval_gguf.problems": 20,
    "eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None},  # of so few problems it says nothing
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A repository on its branch main in which this graph was rebuilt as the guide says, and committed."""
    folder = tmp_path_factory.mktemp("uses") / "mathmind"
    copy_of_the_tree(folder)
    for command in (["branch", "-M", "main"], ["config", "user.name", "test"], ["config", "user.email", "test@example.org"]):
        git(folder, *command)
    change(folder, **SMALLER)
    walk(folder, "Rebuild")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a graph of two minutes")
    write_plots_page(folder)
    return folder


@pytest.fixture
def place(original, tmp_path):
    """A copy of it, cache and outs too, and room beside it."""
    folder = tmp_path / "mathmind"
    subprocess.run(["cp", "-a", str(original), str(folder)], check=True)
    yield folder
    end_queue_workers(folder)


def walk(folder, section):
    """Types a section's commands; each ends well and says what the guide shows. Returns what the last run of each said."""
    words = {}
    for command, shown in commands(section):
        if command.startswith("cd "):
            folder = folder / command.removeprefix("cd ")
            continue
        words[command] = typed(folder, command)
        deadline = time.monotonic() + 400
        while command == "dvc queue status" and re.search("Queued|Running", words[command]) and time.monotonic() < deadline:
            time.sleep(2)  # asking takes dvc a second of a core that the workers could use
            words[command] = typed(folder, command)
        said = iter(map(bare, words[command].splitlines()))
        missing = [line for line in shown if not any(re.fullmatch(pattern(line), other) for other in said)]
        assert not missing, f"{command} said\n{words[command]}\nwithout, or in another order,\n" + "\n".join(missing)
    return words


def commands(section):
    """A section's commands in order, each with the lines that the guide shows below it."""
    found = []
    for line in "".join(BLOCK.findall(GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0])).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif line != "...":
            found[-1][1].append(line)
    return found


def typed(folder, command):
    """What a command says, through a file: a pipe would be held open by the workers that a queue starts."""
    how = {"cwd": folder, "env": environment(PYTHONUNBUFFERED="1"), "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryFile("w+") as file:
        done = subprocess.run(["bash", "-c", command], stdout=file, **how)
        file.seek(0)
        said = file.read()
    assert done.returncode == 0, f"{command} ended with {done.returncode} and said\n{said}"
    return said


def bare(line):
    """A line without what differs from run to run: numbers, hashes, times of day, the width of columns."""
    return " ".join(re.sub(r"\b[0-9a-f]{7,}\b|-?\d[\d.:]*( [AP]M)?", "#", line).split())


def pattern(line):
    return re.escape(bare(line)).replace(re.escape("..."), ".*")


def test_every_section_of_the_guide_is_walked_here():
    walked = re.findall(r"""walk\(\w+, "(.*)"\)""", Path(__file__).read_text(encoding="utf-8"))
    assert walked == re.findall("^## (.*)$", GUIDE, flags=re.MULTILINE)


def test_one_changed_parameter_reruns_what_follows_from_it_and_the_way_back_leaves_nothing(place):
    walk(place, "Change one thing")
    assert rate(place, experiments(place)["slower"]) == 0.0001
    assert rate(place, "main") == 0.001 and git(place, "status", "--porcelain") == ""
    assert "up to date" in typed(place, "dvc status")


def test_four_experiments_are_worked_off_by_two_workers_and_one_becomes_a_branch(place):
    walk(place, "A sweep, two at a time")
    found = experiments(place)
    rates = {name: rate(place, commit) for name, commit in found.items()}
    assert rates == {"rate-1": 0.0002, "rate-2": 0.0005, "rate-3": 0.002, "rate-4": 0.004}
    assert len({weights(place, commit) for commit in (*found.values(), "main")}) == 5
    assert weights(place, "twice-the-rate") == weights(place, found["rate-3"])
    assert git(place, "status", "--porcelain") == ""


def test_a_branch_is_compared_with_main_in_parameters_scores_and_curves(place):
    walk(place, "Compare a branch with main")
    page = (place / "dvc_plots/index.html").read_text(encoding="utf-8")
    curve = re.search(r"""<div id ?= ?"reward_of_grpo">(.*?)</div>""", page, flags=re.DOTALL)[1]
    assert '"rev": "main"' in curve and '"rev": "workspace"' in curve
    assert git(place, "status", "--porcelain") == ""


def test_a_fresh_clone_pulls_what_was_pushed_and_has_nothing_to_run(place):
    words = walk(place, "Share what was made")
    assert "Running stage" not in words["dvc repro"]
    assert git(place.parent / "another", "status", "--porcelain") == ""


def test_dvc_ends_well_where_other_bits_come_out_and_writes_over_the_lock(place):
    words = walk(place, "What DVC leaves open")
    assert words["git diff --stat dvc.lock"] == ""
    lock = (place / "dvc.lock").read_text()
    committed = hash_of(place / "results/comparison.json")
    (place / "dvc.lock").write_text(lock.replace(committed, "f" * 32))
    git(place, "commit", "-qam", "a hash that no run gives")
    typed(place, "dvc repro --force --single-item compare")
    assert (place / "dvc.lock").read_text() == lock
    assert "dvc.lock | 2 +-" in typed(place, "git diff --stat dvc.lock")


def rate(folder, commit):
    return locked(folder, commit)["params"]["params.yaml"]["grpo"]["lr"]


def weights(folder, commit):
    return next(out["md5"] for out in locked(folder, commit)["outs"] if out["path"] == "models/grpo")


def locked(folder, commit):
    return parse_yaml(git(folder, "show", f"{commit}:dvc.lock"))["stages"]["grpo"]
