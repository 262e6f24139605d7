"""Generation with vLLM, on a CUDA GPU: continuous batching, and answers that do not depend on the batch where the GPU can."""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from pydantic import Field

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.params import StageParams
from stages.inference.engine import Completion, Sampling, in_order

SHARE = 0.02  # of the card that vLLM asks to be free when it starts; kv_cache_gib says what it takes
CONTEXT = 4096  # tokens of a prompt and its answer, where a model has room for more
BATCHED_TOKENS = 16_384  # of prompts that are computed at once
SIZES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)  # of batches with a CUDA graph of their own, which takes 0.2 s to make
GIB = 2**30
SUPPORTED_FROM = (7, 5)  # compute capability: a T4's; CUDA 13 knows none below
BATCH_INVARIANT_FROM = (9, 0)  # compute capability with kernels whose sums do not follow the batch (Hopper and later)
HOPPER = 9  # the generation (major compute capability) that our own attention was measured on
PLAIN_ATTENTION = {"Qwen2ForCausalLM", "LlamaForCausalLM"}  # a softmax over all tokens before, and nothing else


class Vllm(StageParams):
    """What an engine takes of a GPU, whatever else is free there: answers then depend on no other program's memory."""

    kv_cache_gib: float = Field(gt=0)  # memory for keys and values, beside the weights
    cuda_graphs: bool  # faster steps, for memory and some seconds at the start


def set_up_vllm(*, batch_invariant: bool = True) -> None:
    """Sets what vLLM reads as it is imported, which `import trl` does too: call it before either.

    One process (one stage, one end), and answers independent of the batch where that is asked and the GPU has kernels for it.
    Raises InputError where there is no CUDA GPU, or one that vLLM has no kernels for.
    """
    import torch

    sys.modules["humming"] = None  # products of weights in few bits, which a process beside this one would compile, whoever needs them
    if not torch.cuda.is_available():
        raise InputError("params.yaml: the engine vllm needs a CUDA GPU and there is none: use transformers")
    if (capability := torch.cuda.get_device_capability()) < SUPPORTED_FROM:
        raise InputError(f"params.yaml: the engine vllm needs a GPU of compute capability {SUPPORTED_FROM[0]}.{SUPPORTED_FROM[1]}, "
                         f"and this one is of {capability[0]}.{capability[1]}: use transformers")  # fmt: skip
    if batch_invariant:
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1" if capability >= BATCH_INVARIANT_FROM else "0")
        if os.environ["VLLM_BATCH_INVARIANT"] != "1":
            measures.note(level="statistical")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def start_vllm(folder: Path, p: Vllm, *, requests: int, **settings: Any):
    """A vllm.LLM in this process on a model folder, for so many requests at a time; call set_up_vllm before."""
    from vllm import LLM

    _inspect_here(folder)
    _norm_in_one_order()
    _multiply_by_cublas()
    _try_plain_sampling()
    settings = _attention(folder) | settings
    gc.freeze()  # vLLM looks for garbage some eight times as it starts, each time among all that was imported: 0.6 s
    if p.cuda_graphs:
        # Without Inductor, whose kernels gain nothing inside CUDA graphs and are chosen by the clock.
        sizes = [size for size in SIZES if size < requests] + [requests]
        settings["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return LLM(
        str(folder),
        skip_tokenizer_init=True,  # it is given tokens and gives tokens; vLLM would copy a tokenizer twice, which takes seconds
        seed=0,
        gpu_memory_utilization=SHARE,
        kv_cache_memory_bytes=int(p.kv_cache_gib * GIB),
        enforce_eager=not p.cuda_graphs,
        max_num_seqs=requests,
        kernel_config={"enable_flashinfer_autotune": False},
        **settings,
    )


def _inspect_here(folder: Path) -> None:
    """Lets this process find out what the model's class can do: vLLM would ask another one, which imports everything once more."""
    from vllm import ModelRegistry

    for name in read_json(folder / "config.json")["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _attention(folder: Path) -> dict[str, Any]:
    """What vLLM is told of attention: nothing, or to take stages/inference/decode_attention.py where model and GPU are what it is for."""
    import torch

    config = read_json(folder / "config.json")
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    plain = set(config["architectures"]) <= PLAIN_ATTENTION and not config.get("use_sliding_window")
    keys_for_each_head = config.get("num_key_value_heads", heads) == heads and size.bit_count() == 1
    if not (plain and keys_for_each_head and torch.cuda.get_device_capability()[0] == HOPPER):
        return {}
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from stages.inference.decode_attention import DecodeAttention

    register_backend(AttentionBackendEnum.CUSTOM)(DecodeAttention)
    return {"attention_config": {"backend": AttentionBackendEnum.CUSTOM}}


def _norm_in_one_order() -> None:
    """Adds residuals before norms and not within them, in batch-invariant mode.

    vLLM 0.26's kernel that does both sums in another order from 256 tokens a step on, in that mode too (vLLM issue 48271): an
    answer would follow how many others are asked.
    """
    from vllm.model_executor.layers import layernorm

    alone = layernorm.rms_norm_batch_invariant

    def norm(x, weight, eps, residual=None):
        if residual is None:
            return alone(x, weight, eps)
        residual.add_(x)
        return alone(residual, weight, eps), residual

    layernorm.rms_norm_batch_invariant = norm


def _multiply_by_cublas() -> None:
    """Takes matrix products to cuBLAS in batch-invariant mode.

    vLLM 0.26 multiplies there with tiles for large batches, whatever the batch (vLLM pull request 53247). Without a work space, which
    the mode takes from it, cuBLAS sums up in one order on Hopper, whatever the rows: tests/gpu/test_vllm_engine.py asks alone and among others.
    """
    from torch.nn.functional import linear as multiply
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def product(x, weight, bias=None):
        out = multiply(x, weight)
        return out if bias is None else out + bias

    linear.linear_batch_invariant = vocab_parallel_embedding.linear_batch_invariant = product


def _try_plain_sampling() -> None:
    """Has vLLM try plain sampling as it starts: on a new machine it would compile for 12 s what penalties and bad words need.

    What else a stage asks for is compiled when it is asked for.
    """
    from vllm import SamplingParams

    SamplingParams.for_sampler_warmup = staticmethod(SamplingParams)


class VllmEngine:
    """A model folder in memory, in 16 bits; up to `batch_size` prompts run at a time, of the length that the caches hold."""

    def __init__(self, folder: Path, batch_size: int, p: Vllm) -> None:
        """See start_vllm."""
        set_up_vllm()
        from transformers import AutoTokenizer, GenerationConfig

        # Each prompt is computed whole: in pieces, of which a cache may hold some, attention adds up in other pieces too, and
        # an answer would follow what else was asked (vLLM pull requests 46592 and 55612).
        whole = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": BATCHED_TOKENS}
        context = min(CONTEXT, read_json(folder / "config.json")["max_position_embeddings"])
        self.llm = start_vllm(folder, p, requests=batch_size, max_model_len=context, **whole)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.template = self.tokenizer.chat_template
        stops = GenerationConfig.from_pretrained(folder).eos_token_id
        self.stops = stops if isinstance(stops, list) else [stops]

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See Engine. Each prompt's samples are drawn with a seed of its own: the call's and the prompt's place."""
        return in_order([self.part_of(prompts, sampling)])

    def part_of(self, prompts: Sequence[str], sampling: Sampling, part: int = 0, parts: int = 1) -> dict[int, Completion]:
        """The completions by their prompts' places, of one engine's part where so many share them: prompts in turn."""
        from vllm import SamplingParams

        places = range(part, len(prompts), parts)
        ids = self._tokens([prompts[place] for place in places])
        asked = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed + place,
                stop_token_ids=self.stops,
                detokenize=False,
            )
            for place in places
        ]
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in ids], asked, use_tqdm=False)
        return {place: self._completion(request.outputs[0]) for place, request in zip(places, outputs, strict=True)}

    def _completion(self, output) -> Completion:
        ended = output.finish_reason == "stop"
        text = self.tokenizer.decode(output.token_ids[:-1] if ended else output.token_ids, skip_special_tokens=True)
        return Completion(text, "stop" if ended else "length", len(output.token_ids))

    def mean_log_probabilities(self, asked: Sequence[tuple[str, str]]) -> list[float]:
        """For each (prompt, answer), the mean log-probability, in nats, that the model gives the answer's tokens."""
        from vllm import SamplingParams

        prompts, answers = (self._tokens([pair[side] for pair in asked]) for side in (0, 1))
        read = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)  # one token: the least that it generates
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt + answer} for prompt, answer in zip(prompts, answers, strict=True)], read, use_tqdm=False
        )
        return [
            mean(position[token].logprob for token, position in zip(answer, output.prompt_logprobs[-len(answer) :], strict=True))
            for answer, output in zip(answers, outputs, strict=True)
        ]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []  # it would fail
