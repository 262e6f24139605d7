"""Engines on two CUDA GPUs: the answers, samples and pairs of one, its log-probabilities, and an end with one that is killed."""

import time

import psutil
import pytest

from stages.harness.jsonl import read_json, read_rows
from stages.inference.spread import Spread
from stages.inference.transformers_engine import TransformersEngine
from stages.inference.vllm_engine import Vllm, VllmEngine
from tests.gpu.test_training import TOLERANCE

pytestmark = pytest.mark.gpu
ENDS_WITHIN = 60  # seconds
STAGES = {
    "eval": {"model": "merged", "mix": "mix"},
    "preference-pairs": {"raw": "raw", "base": "base", "mix": "mix", "teacher": "teacher"},
}


def outs(stage: str, name: str) -> dict[str, str]:
    return {"out": f"{name}-pairs"} if stage != "eval" else {"out_metrics": f"{name}/metrics.json", "out_predictions": f"{name}/predictions.jsonl"}


@pytest.mark.parametrize(("stage", "changes"), [
    ("eval", {"eval.n_samples": 4, "eval.problems": 200}),
    ("eval", {"eval.engine": "transformers", "eval.batch_size": 100}),
    ("preference-pairs", {"preference_pairs.engine": "vllm", "preference_pairs.keep": "most_plausible"}),
])  # fmt: skip
def test_two_gpus_give_the_bytes_of_one(place, gpus, monkeypatch, stage, changes):
    place.set_params(changes)
    made = {}
    for count in (1, 2):
        monkeypatch.setitem(place.environment, "CUDA_VISIBLE_DEVICES", ",".join(gpus[:count]))
        name = f"spread-{place.runs}"
        place.do(stage, **STAGES[stage], **outs(stage, name))
        made[count] = {path.name: path.read_bytes() for path in place.folder.glob(f"{name}*/*")}
        record = read_json(place / f"scratch-{place.runs}/stage.json")
        print(stage, count, {key: record.get(key) for key in ("level", "engines", "seconds", "answering_seconds", "peak_gpu_memory_mib")})
    place.set_params({})
    assert made[1] and made[1] == made[2]
    assert record["engines"] == 2 and record["peak_gpu_memory_mib"] > 100


def test_vllm_s_log_probabilities_are_transformers(place, gpus):
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in read_rows(place / "mix/test.jsonl")][:201]
    expected = TransformersEngine.from_folder(place / "base", 1).mean_log_probabilities(pairs)
    spread = Spread(VllmEngine, place / "base", 64, Vllm(kv_cache_gib=4.0, cuda_graphs=False), gpus=gpus)
    found, alone = spread.mean_log_probabilities(pairs), spread.mean_log_probabilities(pairs[:1])
    spread.close()
    print("furthest apart, in nats:", max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True)))
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert alone == found[:1]


@pytest.mark.parametrize("after", [0, 20])  # seconds from the engines' processes on: as they start, and later
def test_a_stage_ends_with_an_engine_that_is_killed(place, gpus, monkeypatch, after):
    monkeypatch.setitem(place.environment, "CUDA_VISIBLE_DEVICES", ",".join(gpus))
    place.set_params({"eval.n_samples": 64})
    started = place.start("eval", **STAGES["eval"], **outs("eval", f"killed-{after}"))
    engines = []
    while len(engines) < 2:
        assert started.poll() is None, started.communicate()
        engines = [child for child in psutil.Process(started.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.02)
    time.sleep(after)
    children = psutil.Process(started.pid).children(recursive=True)
    engines[1].kill()
    output, _ = started.communicate(timeout=ENDS_WITHIN)
    place.set_params({})
    assert started.returncode == 1 and f"the engine on GPU {gpus[1]} was killed (SIGKILL)" in output, output
    assert not psutil.wait_procs(children, timeout=5)[1] and not (place / f"killed-{after}").exists()
