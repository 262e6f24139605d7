"""docs/experiments.md, walked: each of its commands is run as it stands there, and says what stands there.

The whole graph is made small, as the tests of single stages make it.
"""

import re
from pathlib import Path

from stages.host.graph import hash_of, parse_yaml
from stages.host.seeds import experiments
from tests.documents import read_page
from tests.pipeline.reader import typed, walk
from tests.pipeline.test_launcher import git

GUIDE = "docs/experiments.md"


def test_every_section_of_the_guide_is_walked_here():
    walked = re.findall(r"""walk\(\w+, GUIDE, "(.*)"\)""", Path(__file__).read_text(encoding="utf-8"))
    assert ["Rebuild", *walked] == re.findall("^## (.*)$", read_page(GUIDE), flags=re.MULTILINE)  # the graph itself is rebuilt so


def test_one_changed_parameter_reruns_what_follows_from_it_and_the_way_back_leaves_nothing(place):
    walk(place, GUIDE, "Change one thing")
    assert rate(place, experiments(place)["slower"]) == 0.0001
    assert rate(place, "main") == 0.001 and git(place, "status", "--porcelain") == ""
    assert "up to date" in typed(place, "dvc status")


def test_the_readme_s_experiments_say_what_it_shows(place):
    """The first is the guide's own, which the test above has typed."""
    walk(place, "README.md", "Change one thing", instead={"dvc exp run -n slower -S grpo.lr=1e-4": "", "eval.problems=500": "eval.problems=50"})
    assert rate(place, "faster-rate") == 0.002 and rate(place, "main") == 0.001
    assert git(place, "branch", "--show-current").strip() == "faster-rate" and git(place, "status", "--porcelain") == ""


def test_three_experiments_are_worked_off_by_two_workers_and_one_becomes_a_branch(place):
    walk(place, GUIDE, "A sweep, two at a time")
    found = experiments(place)
    rates = {name: rate(place, commit) for name, commit in found.items()}
    assert rates == {"rate-1": 0.0002, "rate-2": 0.0005, "rate-3": 0.002}
    assert len({weights(place, commit) for commit in (*found.values(), "main")}) == 4
    assert weights(place, "twice-the-rate") == weights(place, found["rate-3"])
    assert git(place, "status", "--porcelain") == ""


def test_a_sweep_as_for_several_gpus_is_worked_off_on_a_cpu_and_one_of_it_reported(place):
    """Its rates are those that the test above has run: what is tried is the way there."""
    walk(place, "docs/clusters.md", "A sweep on one GPU, two or eight", instead={"1e-6,3e-6,1e-5,3e-5": "2e-4,5e-4"})
    assert {name: rate(place, commit) for name, commit in experiments(place).items()} == {"rate-1": 0.0002, "rate-2": 0.0005}
    assert "lr: 0.0005" in (place / "params.yaml").read_text() and (place / "results/report.html").is_file()


def test_a_branch_is_compared_with_main_in_parameters_scores_and_curves(place):
    walk(place, GUIDE, "Compare a branch with main")
    page = (place / "dvc_plots/index.html").read_text(encoding="utf-8")
    curve = re.search(r"""<div id ?= ?"reward_of_grpo">(.*?)</div>""", page, flags=re.DOTALL)[1]
    assert '"rev": "main"' in curve and '"rev": "workspace"' in curve
    assert git(place, "status", "--porcelain") == ""


def test_a_fresh_clone_pulls_what_was_pushed_and_has_nothing_to_run(place):
    words = walk(place, GUIDE, "Share what was made")
    assert "Running stage" not in words["dvc repro"]
    assert git(place.parent / "another", "status", "--porcelain") == ""


def test_dvc_ends_well_where_other_bits_come_out_and_writes_over_the_lock(place):
    words = walk(place, GUIDE, "What DVC leaves open")
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
