"""vLLM beside transformers, on a CUDA GPU, with the embedded profile's own merged model: run `make repro` first.

    python -m pytest tests/gpu/test_vllm_engine.py
"""

import os
from pathlib import Path

import pytest

from stages.corpus.chat_format import render
from stages.harness.jsonl import read_rows
from stages.inference.engine import Sampling

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("MATHMIND_TEST_MODEL", ROOT / "models/merged/sft"))
TEST = Path(os.environ.get("MATHMIND_TEST_ROWS", ROOT / "data/mix/test.jsonl"))
GREEDY = Sampling(max_new_tokens=96)


@pytest.fixture(scope="module")
def vllm():
    from stages.inference.vllm_engine import VllmEngine

    return VllmEngine(MODEL)


@pytest.fixture(scope="module")
def prompts(vllm):
    return [render(vllm.template, row["question"]) for row in read_rows(TEST)]


@pytest.fixture(scope="module")
def greedy(vllm, prompts):
    return vllm.generate(prompts, GREEDY)


def test_the_same_answers_come_from_both_engines(greedy, prompts):
    from stages.inference.transformers_engine import TransformersEngine

    theirs = TransformersEngine.from_folder(MODEL, batch_size=500).generate(prompts, GREEDY)
    same = sum(a.text == b.text for a, b in zip(greedy, theirs, strict=True))
    print(f"same text: {same} of {len(prompts)}")
    assert same >= 0.95 * len(prompts)  # both in 16 bits, whose last bit the kernels' order of sums decides
    ends = [(a.finish_reason, a.tokens) == (b.finish_reason, b.tokens)
            for a, b in zip(greedy, theirs, strict=True) if a.text == b.text]  # fmt: skip
    assert sum(ends) >= 0.99 * len(ends)


def test_an_answer_does_not_depend_on_its_batch(vllm, greedy, prompts):
    alone = vllm.generate(prompts[:100], GREEDY)
    assert [answer.text for answer in alone] == [answer.text for answer in greedy[:100]]
    assert vllm.generate(prompts, GREEDY) == greedy


def test_samples_differ_from_each_other_and_come_again(vllm, prompts):
    sampling = Sampling(max_new_tokens=96, temperature=1.0, seed=3)
    repeated = [prompt for prompt in prompts[:50] for _ in range(8)]
    first = vllm.generate(repeated, sampling)
    texts = [[answer.text for answer in first[start : start + 8]] for start in range(0, 400, 8)]
    assert sum(len(set(group)) > 1 for group in texts) >= 25
    assert vllm.generate(repeated, sampling) == first


def test_an_answer_ends_before_its_stop_token_or_at_the_limit(greedy):
    assert {answer.finish_reason for answer in greedy} <= {"stop", "length"}
    assert all("<|im_end|>" not in answer.text and "<|endoftext|>" not in answer.text for answer in greedy)
    assert all(answer.tokens == 96 for answer in greedy if answer.finish_reason == "length")
