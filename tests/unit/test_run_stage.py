"""What a stage's process keeps from the libraries that it imports, and takes away once they have read it."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages.harness.arithmetic import STRICT_WORK_SPACE, WORK_SPACE
from stages.harness.run_stage import determinism
from tests.imports import ROOT

CODE = """
import sys
from importlib.util import find_spec
from stages.harness.run_stage import _spare_imports
_spare_imports(sys.argv[1])
print(*(name for name in ("pandas", "scipy", "wandb") if find_spec(name)))
"""


@pytest.mark.parametrize(("stage", "found"), [("merge", "pandas"), ("prepare-mix", "pandas scipy"), ("eval", "")])
def test_no_stage_finds_wandb_and_scipy_only_one_that_hashes_words(stage, found):
    done = subprocess.run([sys.executable, "-c", CODE, stage], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_the_packages_whose_versions_libraries_ask_for_are_named_as_their_distributions():
    """So that they need not look for them in each distribution there is."""
    asked = set()
    for library, module in (("transformers", "utils/import_utils.py"), ("trl", "import_utils.py")):
        code = Path(find_spec(library).submodule_search_locations[0], module).read_text()
        asked |= set(re.findall(r'_is_package_available\("(\w+)", return_version=True\)', code))
    of = packages_distributions()
    installed = sorted(asked & set(of) - {"gguf"})  # llama-cpp-python's, and transformers reads no such file here
    assert {"torch", "peft", "bitsandbytes"} <= set(installed)
    assert [of[package][0].replace("-", "_") for package in installed] == installed


def test_the_work_space_that_torch_reads_once_is_the_one_that_stages_are_given():
    assert determinism(ROOT)[WORK_SPACE] == STRICT_WORK_SPACE
