"""A base that two GPUs share out: the updates of two that each hold all of it, the same bytes again, and less memory of each."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.harness.jsonl import read_json
from stages.harness.ranks import SHARDED
from tests.gpu.conftest import AT_ONCE, UPDATES, beside, inputs
from tests.gpu.test_training import PACKED, TOLERANCE, adapter, column, falls

pytestmark = pytest.mark.gpu
IN_FOUR_BITS = {**PACKED, "dequantise": False}
LARGE = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
         "layer_types": None, "initializer_range": 0.02, "tie_word_embeddings": False}  # fmt: skip


@pytest.fixture(autouse=True)
def two_gpus() -> str:
    """Their numbers, as a process is told them."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    return ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2])


@pytest.fixture
def on_two(place, two_gpus):
    """Trains a method in two processes, side by side with other changes of its section; returns the folders."""

    def one(method: str, name: str, sharded: bool, changes: dict, base: str | None) -> Path:
        run = beside(place, f"{method}-on-two-{name}", {f"{method}.{key}": value for key, value in changes.items()})
        run.environment |= {"CUDA_VISIBLE_DEVICES": two_gpus, SHARDED: str(sharded).lower()}
        run.do(method, processes=2, **inputs(place, method) | ({"base": base} if base else {}), out="out", out_curve="curve.csv")
        return run.folder

    def all_of(method: str, runs: dict[str, tuple[bool, dict]], base: str | None = None) -> list[Path]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            started = [pool.submit(one, method, name, *run, base) for name, run in runs.items()]
            return [run.result() for run in started]

    return all_of


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
