"""DVC's own experiments through docker/run: in a temporary copy with its record, and the queued seeds of `mathmind seeds`."""

import json
import signal
import subprocess
import sys
import time

import pytest

from stages.host.repro import shares_of_cores
from stages.host.seeds import collect, experiments
from tests.pipeline.test_launcher import change, clone, dvc, end_queue_workers, environment, git, misbehave, only, scratch  # noqa: F401

PATIENCE = 240  # seconds until a queue of two is worked off on one core of a busy machine


@pytest.fixture
def committed(clone):  # noqa: F811
    """A clone in which fetch has run and its lock and record are committed."""
    done = dvc(clone, "repro", "fetch")
    assert done.returncode == 0, done.stderr
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "fetched", "--allow-empty")  # of a run that DVC's cache knows there is no new record
    return clone


def test_an_experiment_in_a_temporary_copy_carries_its_outs_and_its_record(committed):
    before = (committed / "dvc.lock").read_bytes()
    done = dvc(committed, "exp", "run", "--temp", "-n", "more-chat", "-S", "fetch.sources.chat.rows=120", "fetch")
    assert done.returncode == 0, done.stderr
    commit = experiments(committed)["more-chat"]
    record = json.loads(git(committed, "show", f"{commit}:results/timing/fetch.json"))
    old = json.loads((committed / "results/timing/fetch.json").read_text())
    assert record["key"] != old["key"]
    assert "rows: 120" in git(committed, "show", f"{commit}:dvc.lock")
    assert (committed / "dvc.lock").read_bytes() == before
    assert scratch(committed) == []


def test_a_learning_rate_in_powers_of_ten_arrives_as_a_number(committed):
    done = dvc(committed, "exp", "run", "--temp", "-n", "rate", "-S", "grpo.lr=1e-5", "fetch")
    assert done.returncode == 0, done.stderr
    from ruamel.yaml import YAML

    params = YAML(typ="safe").load(git(committed, "show", f"{experiments(committed)['rate']}:params.yaml"))
    assert params["grpo"]["lr"] == 1e-5


def test_seeds_are_queued_once_and_their_scores_collected(clone):  # noqa: F811
    """The graph up to the base model stands for the whole, with the committed metrics.json as its scores."""
    only(clone, "fetch", "base-model")
    change(clone, fetch__sources__pretraining__rows=500, base_model__steps=2, base_model__architecture__layers=1)
    assert dvc(clone, "repro").returncode == 0
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "a base")

    def seeds(*arguments):
        command = [sys.executable, "-m", "stages", "seeds", *arguments]
        return subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True)

    refused = seeds("--n", "2", "merge")
    assert refused.returncode == 2 and "merge has no seed of its own" in refused.stderr
    first = seeds("--n", "2", "base-model")
    assert first.returncode == 0, first.stderr
    name = first.stdout.split()[0]
    assert name.startswith("base-model-seed-1-")
    assert "asked for before" in seeds("--n", "2", "base-model").stdout
    assert json.loads(seeds("--n", "2", "--json", "base-model").stdout) == []
    assert collect(clone)[name]["models"] is None

    dvc(clone, "queue", "start", "-j", "1")
    deadline = time.monotonic() + 400
    while name not in experiments(clone) and time.monotonic() < deadline:
        time.sleep(1)
    metrics = json.loads((clone / "metrics.json").read_text())
    assert collect(clone)[name] | {"recipe": "", "results": ""} == {
        "stage": "base-model", "seed": 1, "recipe": "", "results": "", **metrics
    }  # fmt: skip
    assert json.loads((clone / "results/seeds.json").read_text())[name]["models"] == metrics["models"]
    with (clone / "docker/Dockerfile").open("a") as file:
        file.write("# changes no bit\n")
    assert dvc(clone, "repro").returncode == 0
    assert name in collect(clone) and "asked for before" in seeds("--n", "2", "base-model").stdout
    change(clone, base_model__steps=3)
    assert dvc(clone, "repro").returncode == 0
    assert collect(clone) == {}  # another base model now


def ended(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_experiments_of_a_queue_run_at_the_same_time_each_on_a_gpu_of_its_own_and_its_share_of_the_cores(committed, tmp_path, all_cores):
    """The GPUs are names alone: fetch computes on none, and each run waits here for the other's."""
    (tmp_path / "on").mkdir()
    change(committed, run__gpus=1)
    misbehave(committed, f"import os, time\nfrom pathlib import Path\non = Path({str(tmp_path / 'on')!r})\n"
              f"(on / os.environ['CUDA_VISIBLE_DEVICES']).write_text(str(os.sched_getaffinity(0)))\nuntil = time.monotonic() + {PATIENCE}\n"
              "while len(list(on.iterdir())) < 2 and time.monotonic() < until:\n    time.sleep(0.1)\n"
              "assert len(list(on.iterdir())) == 2, 'alone'")  # fmt: skip
    git(committed, "commit", "-qam", "a GPU")
    assert dvc(committed, "exp", "run", "--queue", "-n", "chats", "-S", "fetch.sources.chat.rows=110,120", "fetch").returncode == 0
    said, _ = (worked := queue(committed, CUDA_VISIBLE_DEVICES="4,6")).communicate(timeout=PATIENCE)
    assert worked.returncode == 0 and len(experiments(committed)) == 2, said
    assert names(tmp_path / "on") == ["4", "6"]
    shares = sorted((tmp_path / "on" / gpu).read_text() for gpu in ("4", "6"))
    assert shares == sorted(map(str, shares_of_cores(2)))


def queue(folder, *arguments, **more):
    command = [sys.executable, "-m", "stages", "queue", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_queue_that_is_told_to_end_or_whose_machine_goes_down_is_gone_on_with_and_a_failure_is_named(committed, tmp_path):
    begun, goes_on = tmp_path / "begun", tmp_path / "goes-on"
    misbehave(committed, f"import time\nfrom pathlib import Path\nPath({str(begun)!r}).touch()\nassert p.sources['chat'].rows != 120, 'not this one'\n"
              f"while not Path({str(goes_on)!r}).exists():\n    time.sleep(0.1)")  # fmt: skip
    git(committed, "commit", "-qam", "slow")
    assert dvc(committed, "exp", "run", "--queue", "-n", "chats", "-S", "fetch.sources.chat.rows=110", "fetch").returncode == 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        started = queue(committed)
        assert ended(begun.exists), started.kill()
        if number == signal.SIGKILL:
            end_queue_workers(committed)  # as a machine that goes down ends all
        started.send_signal(number)
        said, _ = started.communicate(timeout=PATIENCE)
        assert started.returncode == (128 + number if number == signal.SIGTERM else -number), said
        begun.unlink()
    goes_on.touch()
    assert dvc(committed, "exp", "run", "--queue", "-n", "fails", "-S", "fetch.sources.chat.rows=120", "fetch").returncode == 0
    said, _ = (last := queue(committed, "-j", "2")).communicate(timeout=PATIENCE)
    assert last.returncode == 1 and "fails failed: `dvc queue logs fails` says why" in said, said
    assert list(experiments(committed)) == ["chats"] and scratch(committed) == []
    assert "not this one" in dvc(committed, "queue", "logs", "fails").stdout
    assert queue(committed).wait(PATIENCE) == 0  # nothing is left, and what has failed stays so
