"""launch/slurm.sbatch, by Slurm itself: a controller and two nodes of our own on this machine, whose GPUs are device files."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from stages.host.seeds import experiments
from tests.pipeline.test_experiments import ended
from tests.pipeline.test_launcher import change, clone, environment, git, misbehave, scratch  # noqa: F401

JOB = "launch/slurm.sbatch"
SIZE = ["--mem=500M", "--cpus-per-task=1"]  # this machine's, not a GPU node's
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which sbatch finds a cluster of two nodes with two GPUs each."""
    if os.getuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("Slurm's daemons are not installed, or this is not root: .ci/run installs them")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-one", "spool-two"):
        (folder / name).mkdir()
    values = {"folder": folder, "host": socket.gethostname().split(".")[0], "ports": free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values), encoding="utf-8")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n", encoding="utf-8")
    settings = {"SLURM_CONF": str(folder / "slurm.conf")}
    commands = (["slurmctld"], ["slurmd", "-N", "one"], ["slurmd", "-N", "two"])
    daemons = [subprocess.Popen([*command, "-D"], env=environment(**settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for command in commands]  # fmt: skip
    asked = ["sinfo", "--noheader", "--format=%t %D"]
    idle = ended(lambda: subprocess.run(asked, env=environment(**settings), capture_output=True, text=True).stdout.strip() == "idle 2", 30)
    assert idle, (folder / "slurmctld.log").read_text()[-2000:]
    yield settings
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def slurm(folder, cluster, *command):
    done = subprocess.run(command, cwd=folder, env=environment(**cluster), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (done.stdout or done.stderr).strip()


def submit(folder, cluster, *command, options=()):
    return slurm(folder, cluster, "sbatch", "--parsable", *SIZE, *options, JOB, *command)


def state(folder, cluster, job):
    """What Slurm says of a job, as a mapping."""
    words = slurm(folder, cluster, "scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def is_done(folder, cluster, job):
    return ended(lambda: state(folder, cluster, job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 120)


@pytest.fixture
def shared(clone, tmp_path):  # noqa: F811
    """A clone with a store, and a fetch that waits until it is told to go on, or takes 60 s: its GPU is a name."""
    change(clone, run__gpus=1)
    misbehave(clone, f"import os, time\nfrom pathlib import Path\nplace = Path({str(tmp_path)!r})\n"
              "(place / f\"on-{os.environ['CUDA_VISIBLE_DEVICES']}-{p.sources['chat'].rows}\").touch()\nuntil = time.monotonic() + 60\n"
              "while not (place / 'go').exists() and time.monotonic() < until:\n    time.sleep(0.1)")  # fmt: skip
    (clone / ".dvc/config.local").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    git(clone, "commit", "-qam", "a GPU")
    return clone


def test_slurm_takes_the_job_as_it_stands_and_in_its_other_shapes(shared, cluster):
    test_only = ["sbatch", "--test-only", *SIZE]
    for options in ([], ["--gpus-per-node=2"], ["--gpus-per-node=0"], ["--nodes=2"]):
        assert "to start at" in slurm(shared, cluster, *test_only, *options, JOB, "dvc", "repro", "fetch")


def test_a_job_whose_time_is_nearly_up_stops_pushes_and_goes_on_in_its_next_turn(shared, cluster, tmp_path):
    job = submit(shared, cluster, "dvc", "repro", "fetch")
    assert ended(lambda: list(tmp_path.glob("on-*"))), log(shared, job)
    slurm(shared, cluster, "scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@300 does
    assert ended(lambda: state(shared, cluster, job)["JobState"] == "PENDING"), log(shared, job)
    assert "Running stage" in log(shared, job) and "wrote data/raw" not in log(shared, job)
    (tmp_path / "go").touch()
    slurm(shared, cluster, "scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself lets it wait for two minutes
    assert is_done(shared, cluster, job), log(shared, job)
    said = state(shared, cluster, job)
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "1"), log(shared, job)
    assert "fetch: wrote data/raw" in log(shared, job)
    assert list((tmp_path / "store/files/md5").rglob("*.dir")) and scratch(shared) == []


def test_experiments_side_by_side_one_a_job_get_a_gpu_each_and_land_in_the_clone(shared, cluster, tmp_path):
    jobs = [submit(shared, cluster, options=["--nodelist=one"], *f"dvc exp run --temp -n chats-{rows} -S fetch.sources.chat.rows={rows} fetch".split())
            for rows in (110, 120)]  # fmt: skip
    both = ended(lambda: len(list(tmp_path.glob("on-*"))) == 2)
    (tmp_path / "go").touch()
    for job in jobs:
        assert is_done(shared, cluster, job) and state(shared, cluster, job)["JobState"] == "COMPLETED", log(shared, job)
    assert both, [path.name for path in tmp_path.glob("on-*")]
    assert {path.name.split("-")[1] for path in tmp_path.glob("on-*")} == {"0", "1"}
    assert sorted(experiments(shared)) == ["chats-110", "chats-120"]
    assert len(list((tmp_path / "store/files/md5").rglob("*.dir"))) == 2


def test_on_two_nodes_the_second_joins_the_stage_that_the_first_runs(shared, cluster, tmp_path):
    """What it starts there; that a machine joins a training is for the tests of training to show."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mathmind").write_text(f"#!/bin/sh\necho $SLURMD_NODENAME $* >>'{tmp_path}/joined'\n", encoding="utf-8")
    (tmp_path / "bin/mathmind").chmod(0o755)
    change(shared, run__nodes=1, run__rendezvous=None)
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
    job = submit(shared, cluster | {"PATH": path}, "grep", "-E", "nodes|rendezvous", "params.yaml", "sft", options=["--nodes=2"])
    assert is_done(shared, cluster, job)
    assert ended((tmp_path / "joined").exists) and (tmp_path / "joined").read_text() == "two join sft --node 1\n", log(shared, job)
    assert "nodes: 2" in log(shared, job) and "rendezvous: one:29400" in log(shared, job)


def log(folder: Path, job: str) -> str:
    time.sleep(0.5)
    return (folder / f"slurm-{job}.out").read_text(encoding="utf-8")
