"""What a stage's process keeps from the libraries that it imports, and takes away once they have read it."""

import os
import subprocess
import sys

import pytest

from stages.harness.arithmetic import STRICT_WORK_SPACE, WORK_SPACE
from stages.harness.run_stage import determinism
from tests.imports import ROOT

CODE = """
import sys
from importlib.util import find_spec
from stages.harness.run_stage import _hide_unused
_hide_unused(sys.argv[1])
print(*(name for name in ("scipy", "wandb") if find_spec(name)))
"""


@pytest.mark.parametrize(("stage", "gpus", "found"), [("merge", "", ""), ("merge", "0", "scipy"), ("prepare-mix", "", "scipy")])
def test_no_stage_finds_wandb_and_scipy_only_those_that_may_use_it(stage, gpus, found):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    done = subprocess.run([sys.executable, "-c", CODE, stage], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_the_work_space_that_torch_reads_once_is_the_one_that_stages_are_given():
    assert determinism(ROOT)[WORK_SPACE] == STRICT_WORK_SPACE
