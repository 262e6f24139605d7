"""Generation with vLLM, on a CUDA GPU: continuous batching, and answers that do not depend on the batch where the GPU can."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.params import StageParams
from stages.inference.engine import Completion, Sampling

SHARE = 0.02  # of the card that vLLM asks to be free when it starts; kv_cache_gib says what it takes
GIB = 2**30
SUPPORTED_FROM = (7, 5)  # compute capability: a T4's; CUDA 13 knows none below
BATCH_INVARIANT_FROM = (9, 0)  # compute capability with kernels whose sums do not follow the batch (Hopper and later)


class Vllm(StageParams):
    """What an engine takes of a GPU, whatever else is free there: answers then depend on no other program's memory."""

    kv_cache_gib: float = Field(gt=0)  # memory for keys and values, beside the weights
    cuda_graphs: bool  # faster steps, for memory and half a minute at the start


def set_up_vllm() -> None:
    """Sets what vLLM reads as it is imported, which `import trl` does too: call it before either.

    One process (one stage, one end), and answers independent of the batch where the GPU has kernels for that.
    Raises InputError where there is no CUDA GPU, or one that vLLM has no kernels for.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("params.yaml: the engine vllm needs a CUDA GPU and there is none: use transformers")
    if (capability := torch.cuda.get_device_capability()) < SUPPORTED_FROM:
        raise InputError(f"params.yaml: the engine vllm needs a GPU of compute capability {SUPPORTED_FROM[0]}.{SUPPORTED_FROM[1]}, "
                         f"and this one is of {capability[0]}.{capability[1]}: use transformers")  # fmt: skip
    if capability >= BATCH_INVARIANT_FROM:
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    if os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        measures.note(level="statistical")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def start_vllm(folder: Path, p: Vllm, **settings: Any):
    """A vllm.LLM in this process on a model folder; see set_up_vllm."""
    set_up_vllm()
    from vllm import LLM

    _inspect_here(folder)
    _norm_in_one_order()
    return LLM(
        str(folder),
        tokenizer=str(folder),
        seed=0,
        gpu_memory_utilization=SHARE,
        kv_cache_memory_bytes=int(p.kv_cache_gib * GIB),
        enforce_eager=not p.cuda_graphs,
        **settings,
    )


def _inspect_here(folder: Path) -> None:
    """Lets this process find out what the model's class can do: vLLM would ask another one, which imports everything once more."""
    from vllm import ModelRegistry

    for name in read_json(folder / "config.json")["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


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


class VllmEngine:
    """A model folder in memory, in 16 bits; up to `batch_size` prompts run at a time, of the length that the caches hold."""

    def __init__(self, folder: Path, batch_size: int, p: Vllm) -> None:
        """See start_vllm."""
        from transformers import GenerationConfig

        # Each prompt is computed whole: in pieces, of which a cache may hold some, attention adds up in other pieces too, and
        # an answer would follow what else was asked (vLLM pull requests 46592 and 55612).
        whole = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
        self.llm = start_vllm(folder, p, max_num_seqs=batch_size, max_model_len=-1, **whole)
        self.tokenizer = self.llm.get_tokenizer()
        self.template = self.tokenizer.chat_template
        self.stops = GenerationConfig.from_pretrained(folder).eos_token_id

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See Engine. Each prompt's samples are drawn with a seed of its own: the call's and the prompt's place."""
        from vllm import SamplingParams

        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        asked = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed + place,
                stop_token_ids=self.stops,
                ignore_eos=False,
            )
            for place in range(len(ids))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in ids], asked, use_tqdm=False)
        return [
            Completion(output.text, "length" if output.finish_reason == "length" else "stop", len(output.token_ids))
            for output in (request.outputs[0] for request in outputs)
        ]
