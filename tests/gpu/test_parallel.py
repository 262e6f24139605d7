"""Data parallelism on two GPUs: the updates of one, and the same bytes again."""

import pytest

from tests.gpu.conftest import UPDATES, beside
from tests.gpu.test_training import TOLERANCE, adapter, column, falls

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]


@pytest.mark.parametrize("method", ["sft", "qlora", "orpo"])
def test_two_gpus_lose_as_one_and_give_the_same_bytes_again(train, on_two, method):
    (one,) = train(method, {"on-one": {}})
    two, again = on_two(method, {"once": (False, {}), "again": (False, {})})
    assert adapter(again) == adapter(two)
    assert (again / "curve.csv").read_bytes() == (two / "curve.csv").read_bytes()
    losses = column(two, "loss")
    assert len(losses) == UPDATES and falls(losses)
    assert losses == pytest.approx(column(one, "loss"), rel=TOLERANCE, abs=TOLERANCE)


def test_two_gpus_pretrain_as_one(place, gpus):
    losses = []
    for processes in (1, 2):
        run = beside(place, f"base-model-on-{processes}", {"base_model.steps": UPDATES, "base_model.save_every": UPDATES})
        run.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:processes])
        run.do("base-model", processes=processes, raw=str(place / "raw"), sources_lock="params.yaml", out="out", out_curve="curve.csv")
        losses.append(column(run.folder, "loss"))
    one, two = losses
    assert len(one) == 1 and two == pytest.approx(one, rel=TOLERANCE)
