"""Stages in apptainer, where it is installed and docker/images holds the cpu image.

CI has neither: its distribution has no apptainer, and turning docker's image into a file takes minutes (docs/clusters.md).
"""

import os
import shutil
import signal
import subprocess
import time

import pytest

from stages.host.engines import image_file
from stages.host.graph import lock_stages
from tests.imports import ROOT
from tests.pipeline.test_launcher import FETCH, change, clone, dvc, environment, launch, misbehave, processes_in, scratch  # noqa: F401

IMAGE = image_file(ROOT, "cpu")
pytestmark = pytest.mark.skipif(not shutil.which("apptainer") or not (ROOT / IMAGE).is_file(), reason=f"no apptainer, or no {IMAGE}")


@pytest.fixture
def contained(clone):  # noqa: F811
    """A clone, in a path with spaces, whose stages run in apptainer."""
    (clone / IMAGE).parent.mkdir()
    os.link(ROOT / IMAGE, clone / IMAGE)
    change(clone, run__engine="apptainer")
    return clone


def test_a_stage_in_apptainer_gives_the_lock_s_bytes(contained):
    lock = lock_stages(contained)["fetch"]["outs"]
    done = dvc(contained, "repro", "fetch")
    assert done.returncode == 0, done.stderr + done.stdout
    assert lock_stages(contained)["fetch"]["outs"] == lock and scratch(contained) == []


def test_a_stage_sees_no_network_no_secret_and_writes_below_its_scratch_folder_alone(contained):
    places = [str(contained / "data/planted"), str(contained / "stages/planted"), "/tmp/planted", "/etc/planted", "/opt/mathmind/planted"]
    misbehave(contained, "import os\nassert 'planted' not in ' '.join(os.environ.values())\nassert os.listdir('/sys/class/net') == ['lo']\n"
              f"for place in {places}:\n    try:\n        open(place, 'w')\n    except OSError:\n        print('refused', place)\n"
              "print(os.environ['HOME'], [line for line in open('/proc/self/status') if line.startswith(('CapEff', 'NoNewPrivs'))])")  # fmt: skip
    done = launch(contained, WANDB_API_KEY="planted")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == len(places) and ".dvc/tmp/mathmind/fetch" in done.stdout
    assert r"CapEff:\t0000000000000000" in done.stdout and r"NoNewPrivs:\t1" in done.stdout, done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_launcher_leaves_nothing(contained, number):
    misbehave(contained, "import time\nprint('begun')\ntime.sleep(60)")
    started = subprocess.Popen(FETCH, cwd=contained, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "begun" not in started.stdout.readline():
        assert started.poll() is None, started.stderr.read()
    assert processes_in(contained)
    started.send_signal(number)
    started.communicate(timeout=30)
    assert started.returncode != 0
    deadline = time.monotonic() + 15
    while processes_in(contained) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(contained) == [] and not (contained / "data/raw").exists()
