"""What a timing record says."""

import json

from stages.harness.params import Run, read_params, section
from stages.host.provenance import write_timing
from tests.imports import ROOT


def level(tree, measured: dict) -> str:
    params = ROOT / "params/scratch-gpu.yaml"
    (tree / "docker").symlink_to(ROOT / "docker")
    write_timing(tree, "grpo", "train", "key", section(params, read_params(params), "run", Run), measured, gpus=[], pinned=True, image_id=None)
    return json.loads((tree / "results/timing/grpo.json").read_text())["level"]


def test_bits_are_promised_unless_the_stage_says_otherwise(tmp_path):
    for name, measured in (("plain", {}), ("loose", {"level": "statistical"})):
        (tmp_path / name).mkdir()
        assert level(tmp_path / name, {"seconds": 1.0, **measured}) == measured.get("level", "bitwise")
