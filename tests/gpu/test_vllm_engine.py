"""vLLM beside transformers, on a CUDA GPU, with a small merged model.

    python -m pytest -m gpu tests/gpu
"""

import pytest

from stages.corpus.chat_format import render
from stages.harness.jsonl import read_rows
from stages.inference.engine import Sampling
from stages.inference.vllm_engine import HOPPER, Vllm, VllmEngine

pytestmark = pytest.mark.gpu
GREEDY = Sampling(max_new_tokens=96)


@pytest.fixture(scope="module")
def vllm(place):
    return VllmEngine(place / "merged", 500, Vllm(kv_cache_gib=8.0, cuda_graphs=False))


@pytest.fixture(scope="module")
def prompts(place, vllm):
    return [render(vllm.template, row["question"]) for row in read_rows(place / "mix/test.jsonl")]


@pytest.fixture(scope="module")
def greedy(vllm, prompts):
    return vllm.generate(prompts, GREEDY)


def test_answers_grow_by_our_own_attention_on_hopper(vllm):
    import torch

    backend = vllm.llm.llm_engine.vllm_config.attention_config.backend
    assert (backend is not None and backend.name == "CUSTOM") == (torch.cuda.get_device_capability()[0] == HOPPER)


def test_the_same_answers_come_from_both_engines(place, greedy, prompts):
    from stages.inference.transformers_engine import TransformersEngine

    theirs = TransformersEngine.from_folder(place / "merged", batch_size=500).generate(prompts, GREEDY)
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


def test_cuda_graphs_change_no_answer(place):
    """Their batches are filled up to the next size that has a graph."""
    made = []
    for graphs in (False, True):
        place.set_params({"eval.engine": "vllm", "eval.batch_size": 300, "eval.vllm.cuda_graphs": graphs})
        outs = {"out_metrics": f"graphs-{graphs}/metrics.json", "out_predictions": f"graphs-{graphs}/predictions.jsonl"}
        place.do("eval", model="merged", mix="mix", **outs)
        made.append((place / outs["out_predictions"]).read_bytes())
    place.set_params({})
    assert made[0] == made[1]


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
