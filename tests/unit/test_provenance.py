"""What a timing record says, and which packages it finds installed."""

import json
from importlib.metadata import distributions

from stages.harness.params import Run, read_params, section
from stages.host.provenance import differing_versions, package_name, write_timing
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


def test_installed_versions_are_those_that_importlib_reads(tmp_path):
    installed = {package_name(package.name): package.version for package in distributions()}
    lock = tmp_path / "any.lock"
    lock.write_text("".join(f"{name}=={version}\n" for name, version in installed.items()))
    assert differing_versions(lock) == []
    lock.write_text("".join(f"{name}==0.0.none\n" for name in installed))
    assert differing_versions(lock) == sorted(f"{name} {version} (lock: 0.0.none)" for name, version in installed.items())
