"""The methods on a CUDA GPU: both backends, strict kernels, precision, rollouts by vLLM, and going on after a kill.

    python -m pytest -m gpu tests/gpu
"""

import csv
import os

import pytest

from stages.harness.arithmetic import STRICT_WORK_SPACE, WORK_SPACE, read_work_space_once
from stages.harness.jsonl import read_json
from tests.gpu.conftest import UPDATES, killed_and_resumed
from tests.pipeline.test_methods import digest

pytestmark = pytest.mark.gpu
PACKED = {"rows": None, "recompute": None, "dequantise": None, "compile": True, "memory_gib": None}
SUPERVISED = ("sft", "qlora", "orpo")
TOLERANCE = 0.02  # relative, and in nats near nothing: sums are taken in other orders in 16 bits, and updates carry that on


def column(folder, name: str) -> list[float]:
    with (folder / "curve.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def falls(losses: list[float]) -> bool:
    """Whether the last quarter's mean is a tenth below the first's: single batches differ by more."""
    quarter = len(losses) // 4
    return sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


def adapter(folder) -> dict[str, str]:
    return {name: value for name, value in digest(folder / "out").items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("method", SUPERVISED)
def test_both_backends_lose_alike_and_strict_kernels_give_the_same_bytes(train, method):
    """From the same weights, on the same rows in the same order."""
    by_unsloth = {"backend": "unsloth"}
    runs = {"first": {}, "again": {}, "unsloth": by_unsloth, "unsloth-again": by_unsloth}
    first, again, unsloth, unsloth_again = train(method, runs)
    for one, other in ((first, again), (unsloth, unsloth_again)):
        assert digest(one / "out") == digest(other / "out")
        assert (one / "curve.csv").read_bytes() == (other / "curve.csv").read_bytes()
    ours, theirs = column(first, "loss"), column(unsloth, "loss")
    assert len(ours) == len(theirs) == UPDATES and falls(ours)
    assert theirs == pytest.approx(ours, rel=TOLERANCE, abs=TOLERANCE)
    assert set(digest(unsloth / "out")) == set(digest(first / "out"))
    configs = [read_json(folder / "out/adapter_config.json") for folder in (first, unsloth)]
    assert configs[0]["r"] == configs[1]["r"] and set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])


@pytest.mark.parametrize("method", SUPERVISED)
def test_fp16_with_scaled_losses_trains_as_bf16_does(train, method):
    (half,) = train(method, {"fp16": {"precision": "fp16"}})
    losses = column(half, "loss")
    assert len(losses) == UPDATES and falls(losses)


def test_grpo_by_vllm_comes_again_and_its_completions_differ_within_a_group(train):
    first, again = train("grpo", {"vllm": {}, "vllm-again": {}})
    assert (again / "curve.csv").read_bytes() == (first / "curve.csv").read_bytes()
    assert adapter(again) == adapter(first)
    assert min(column(first, "rewards.distinct.mean")) > 0.1 and max(column(first, "frac_reward_zero_std")) < 1


def test_grpo_trains_in_every_way_of_holding_base_and_engine(train):
    """The stage itself fails where the frozen base is another after training."""
    rollouts = {"engine": "vllm", "merged": False, "kv_cache_gib": 2.0, "cuda_graphs": False, "importance_correction": True, "importance_cap": 3.0}
    runs = {
        "hf": {"rollouts": {**rollouts, "engine": "transformers"}},
        "nf4": {"nf4": True, "rollouts": rollouts},
        "unsloth": {"backend": "unsloth", "rollouts": rollouts},
        "fp16": {"precision": "fp16", "rollouts": rollouts},
        "kl": {"beta": 0.01, "rollouts": rollouts},
        "merged": {"rollouts": {**rollouts, "merged": True}},
        "packed": {"packed": PACKED, "rollouts": {**rollouts, "merged": True}},
        "packed-in-parts": {"packed": {**PACKED, "rows": 8, "compile": False}, "rollouts": rollouts},
    }
    for folder in train("grpo", runs):
        assert len(column(folder, "reward")) == 6, folder


def test_the_engine_does_not_change_what_the_trainer_computes(place):
    """vLLM's batch-invariant mode replaces kernels in the whole process, the one of rotary angles among them."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.inference.vllm_engine import Vllm, set_up_vllm, start_vllm

    set_up_vllm()
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32, device_map="cuda").eval()
    tokens = torch.randint(model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        before = model(tokens).logits
        engine = start_vllm(place / "base", Vllm(kv_cache_gib=1.0, cuda_graphs=False), requests=1, dtype="bfloat16", max_model_len=512)
        after = model(tokens).logits
    engine.llm_engine.engine_core.shutdown()
    assert (after - before).norm() / before.norm() < 1e-4


def test_strict_products_have_their_bits_also_when_torch_no_longer_reads_the_work_space(monkeypatch):
    import torch

    monkeypatch.setenv(WORK_SPACE, STRICT_WORK_SPACE)
    torch.use_deterministic_algorithms(True)
    try:
        a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((1000, 2560), (2560, 6912)))
        before = a @ b
        read_work_space_once()
        assert WORK_SPACE not in os.environ and torch.are_deterministic_algorithms_enabled()
        assert torch.equal(a @ b, before)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("method", "checkpoint"), [("sft", 10), ("qlora", 10), ("orpo", 10), ("grpo", 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(place, train, method, checkpoint):
    (whole,) = train(method, {"undisturbed": {}})
    run = killed_and_resumed(place, method, checkpoint)
    assert adapter(run.folder) == adapter(whole)
    assert (run / "curve.csv").read_bytes() == (whole / "curve.csv").read_bytes()
