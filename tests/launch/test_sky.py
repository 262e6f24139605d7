"""launch/sky.yaml, read by SkyPilot itself; what it runs on the rented machine is run here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT
from tests.pipeline.test_launcher import clone, environment  # noqa: F401

SKYPILOT = "skypilot==0.14.1"  # its packages and DVC's pin each other out, so uv keeps them in an environment of their own
READ = """import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
kinds = sorted(name for one in task.resources for name in one.accelerators)
print(json.dumps({"run": task.run, "setup": task.setup, "envs": task.envs, "workdir": task.workdir, "kinds": kinds}))"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task as SkyPilot understands it."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    command = [uv, "run", "--no-project", "--quiet", "--with", SKYPILOT, "python", "-c", READ, str(ROOT / "launch/sky.yaml")]
    home = tmp_path_factory.mktemp("home")  # where it writes a user's hash
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True).stdout.strip()
    read = subprocess.run(command, cwd=home, env=environment(HOME=str(home), UV_CACHE_DIR=cache, SKYPILOT_DISABLE_USAGE_COLLECTION="1"),
                          capture_output=True, text=True)  # fmt: skip
    assert read.returncode == 0, read.stderr
    return json.loads(read.stdout.splitlines()[-1])


def test_skypilot_reads_the_task(task):
    assert task["kinds"] == ["A100-80GB", "H100", "H200"] and task["workdir"] == "."
    assert (ROOT / f"params/{task['envs']['PROFILE']}.yaml").is_file()
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0


def test_what_the_task_runs_pulls_works_and_pushes(task, clone, tmp_path):  # noqa: F811
    given = environment(**{**task["envs"], "COMMAND": "dvc repro fetch", "STORE": str(tmp_path / "store")})
    for said in ("Running stage 'fetch'", "'fetch' didn't change, skipping"):
        done = subprocess.run(["bash", "-c", task["run"]], cwd=clone, env=given, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
        assert list((tmp_path / "store/files/md5").rglob("*.dir"))
        for folder in ("data", ".dvc/cache"):
            shutil.rmtree(clone / folder)  # another machine
    wrong = subprocess.run(["bash", "-c", task["run"]], cwd=clone, env=given | {"COMMAND": "false"}, capture_output=True)
    assert wrong.returncode == 1
