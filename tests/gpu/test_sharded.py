"""A base that two GPUs share out: the updates of two that each hold all of it, the same bytes again, and less memory of each."""

import shutil

import pytest

from stages.harness.jsonl import read_json
from tests.gpu.conftest import UPDATES
from tests.gpu.test_training import PACKED, TOLERANCE, adapter, column, falls

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]
IN_FOUR_BITS = {**PACKED, "dequantise": False}
LARGE = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
         "layer_types": None, "initializer_range": 0.02, "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.parametrize(("method", "packed"), [("qlora", None), ("qlora", IN_FOUR_BITS), ("sft", PACKED), ("orpo", PACKED)])
def test_two_gpus_that_share_the_base_out_lose_as_two_that_hold_all_of_it_and_give_the_same_bytes_again(on_two, method, packed):
    name = "packed" if packed else "padded"
    runs = {f"{name}-whole": (False, {"packed": packed}), f"{name}-shared": (True, {"packed": packed}), f"{name}-again": (True, {"packed": packed})}
    whole, shared, again = on_two(method, runs)
    assert adapter(again) == adapter(shared)
    assert (again / "curve.csv").read_bytes() == (shared / "curve.csv").read_bytes()
    losses = column(shared, "loss")
    assert len(losses) == UPDATES and falls(losses)
    assert losses == pytest.approx(column(whole, "loss"), rel=TOLERANCE, abs=TOLERANCE)
    print(f"{method}, {name}: the bytes of processes that hold all of it: {adapter(shared) == adapter(whole)}")


@pytest.fixture(scope="module")
def large(place) -> str:
    """A base of 1.1 billion weights, drawn at random, with a head of its own."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = place / "large"
    shutil.copytree(place / "base", folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**read_json(folder / "config.json") | LARGE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("method", "saved"), [("sft", 400), ("qlora", 50)])
def test_a_gpu_of_two_that_share_the_base_out_needs_less_memory(on_two, large, method, saved):
    """saved: MiB at the least, of about 1,020 and 270 that half of the layers takes, less three layers that are gathered, 130 and 34 each."""
    few = {"max_steps": 4, "packed": {**IN_FOUR_BITS, "rows": 1, "recompute": True}}
    whole, shared = on_two(method, {"large-whole": (False, few), "large-shared": (True, few)}, large)
    before, now = (read_json(folder / "scratch-1/stage.json")["peak_gpu_memory_mib"] for folder in (whole, shared))
    print(f"{method}: {before} MiB a GPU that holds the whole base, {now} where two share it out")
    assert now < before - saved
    assert column(shared, "loss") == pytest.approx(column(whole, "loss"), rel=TOLERANCE, abs=TOLERANCE)
