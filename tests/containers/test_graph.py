"""The whole embedded graph in containers: the lock and the metrics that were committed, byte for byte."""

import json

import pytest

from tests.imports import ROOT
from tests.pipeline.test_launcher import mathmind


@pytest.mark.timeout(1800)  # 9 minutes on a slow machine
def test_the_embedded_graph_gives_the_committed_lock_and_metrics(contained, engine, image):
    (contained / "metrics.json").unlink()  # or DVC would leave compare out
    done = mathmind(contained, "repro")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("dvc.lock", "metrics.json", "results/comparison.json"):
        assert (contained / name).read_bytes() == (ROOT / name).read_bytes(), name
    for record in (contained / "results/timing").glob("*.json"):
        told = json.loads(record.read_text())
        assert (told["engine"], told["image_id"]) == (engine, image), record.name
