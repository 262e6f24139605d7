"""`mathmind repro` over a graph of shell commands: side by side, in order, on shares of the cores, and stopped by a failure."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from stages.harness.errors import InputError
from stages.harness.jsonl import write_json
from stages.host.repro import at_once, reproduce
from tests.imports import ROOT

MEET = "touch {me}.here; until [ -f {other}.here ]; do sleep 0.02; done; "  # runs only beside the other
ENDLESS = "touch begun; sleep 60; "
RAN = "echo {name} >> ran; cp {name}.in {name}.out; "
TOGETHER = {me: MEET.format(me=me, other=other) for me, other in (("left", "right"), ("right", "left"))}
NEEDS = {"first": (), "left": ("first",), "right": ("first",), "last": ("left", "right")}


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """Writes a graph in the current folder, first, then left and right, then last, with these commands before what each does; returns its folder."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / "params/embedded.yaml", tmp_path / "params.yaml")

    def write(needs=NEEDS, **commands: str) -> Path:
        stages = {}
        for name, others in needs.items():
            if not (tmp_path / f"{name}.in").exists():
                (tmp_path / f"{name}.in").write_text(name)
            deps = [f"{name}.in", *(f"{other}.out" for other in others)]
            stages[name] = {"cmd": commands.get(name, "") + RAN.format(name=name), "deps": deps, "outs": [f"{name}.out"]}
        with (tmp_path / "dvc.yaml").open("w") as file:
            YAML().dump({"stages": stages}, file)
        return tmp_path

    return write


def ran(folder: Path) -> list[str]:
    """What has run since the last time it was asked."""
    names = (folder / "ran").read_text().split() if (folder / "ran").exists() else []
    (folder / "ran").unlink(missing_ok=True)
    return names


def begun(folder: Path) -> subprocess.Popen:
    """`mathmind repro` by two, in a process group of its own, once the endless stage runs."""
    command, environment = [sys.executable, "-m", "stages", "repro", "--jobs", "2"], {**os.environ, "PYTHONPATH": str(ROOT)}
    # These tests may have been started in the background of a script, where SIGINT is ignored, and so would it be here.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(command, cwd=folder, env=environment, process_group=0, preexec_fn=heard)
    while not (folder / "begun").exists():
        assert started.poll() is None
        time.sleep(0.02)
    return started


def test_stages_that_do_not_need_each_other_run_side_by_side_and_only_what_changed_runs_again(graph, capfd):
    folder = graph(**TOGETHER)
    assert reproduce(2) == []
    names = ran(folder)
    assert (names[0], {*names[1:3]}, names[3:]) == ("first", {"left", "right"}, ["last"])
    lock = (folder / "dvc.lock").read_bytes()
    capfd.readouterr()
    assert reproduce(2) == [] and ran(folder) == []
    assert capfd.readouterr().out == "Data and pipelines are up to date.\n" and (folder / "dvc.lock").read_bytes() == lock
    (folder / "left.in").write_text("another")
    assert reproduce(2) == [] and ran(folder) == ["left", "last"]
    assert subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"], cwd=folder).returncode == 0


def test_what_follows_from_a_stage_that_gave_the_same_does_not_run(graph):
    folder = graph()
    assert reproduce(2) == [] and len(ran(folder)) == 4
    folder = graph(first="true; ")
    assert reproduce(2) == [] and ran(folder) == ["first"]


def test_the_longest_way_to_the_end_comes_first(graph):
    folder = graph({"a": (), "b": (), "c": (), "d": ("c",)})
    for name, seconds in {"a": 1, "b": 5, "c": 2, "d": 4}.items():
        write_json(folder / f"results/timing/{name}.json", {"seconds": seconds})
    assert reproduce(1) == [] and ran(folder) == ["c", "b", "d", "a"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_stage_alone_has_all_cores_and_one_of_two_its_share(graph, all_cores, gpus):
    folder = graph(**{name: TOGETHER.get(name, "") + f"nproc > {name}.cores; " for name in NEEDS})
    (folder / "params.yaml").write_text((ROOT / "params/embedded.yaml").read_text().replace("  gpus: 0", f"  gpus: {gpus}"))
    assert reproduce(2) == []
    here = len(os.sched_getaffinity(0))
    cores = {name: int((folder / f"{name}.cores").read_text()) for name in NEEDS}
    assert cores["first"] == cores["last"] == here
    assert cores["left"] + cores["right"] == max(here, 2)


def test_after_a_failure_what_runs_comes_to_its_end_and_nothing_more_is_started(graph):
    folder = graph(left=TOGETHER["left"] + "sleep 1; ", right=TOGETHER["right"] + "exit 3; ")
    (failure,) = reproduce(2)
    assert failure.startswith("failed to reproduce 'right': failed to run: ") and failure.endswith("exited with 3")
    assert ran(folder) == ["first", "left"]
    graph(left=TOGETHER["left"] + "sleep 1; ")
    assert reproduce(2) == [] and ran(folder) == ["right", "last"]


def test_a_worker_that_is_killed_is_a_sentence(graph):
    folder = graph(left="kill -9 $PPID; ")
    (failure,) = [said for said in reproduce(2) if said.startswith("left")]
    assert "a worker was killed" in failure


def test_without_a_graph_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params/embedded.yaml", tmp_path / "params.yaml")
    with pytest.raises(InputError, match="not inside of a DVC repository"):
        reproduce(2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_end_with_what_started_them(graph, number, status):
    started = begun(graph(left=ENDLESS))
    workers = [child for child in psutil.Process(started.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    started.send_signal(number)
    assert started.wait(timeout=20) == status
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=5)[1]


def test_a_ctrl_c_ends_the_stages_and_then_the_command(graph):
    folder = graph(left=ENDLESS)
    started = begun(folder)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=20) == 1
    assert "left" not in ran(folder) and not (folder / "left.out").exists()


@pytest.mark.parametrize(("cores", "stages"), [(1, 1), (2, 2), (8, 2)])
def test_on_cpus_two_run_at_once_where_there_are_cores_for_them(tmp_path, monkeypatch, cores, stages):
    shutil.copy(ROOT / "params/embedded.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert at_once() == stages


def test_on_gpus_as_many_run_at_once_as_those_seen_suffice_for(tmp_path, monkeypatch):
    text = (ROOT / "params/embedded.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("  gpus: 0", "  gpus: 2"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert at_once() == 2
