"""Generation with vLLM, on a CUDA GPU: continuous batching, prefixes shared, answers that do not depend on the batch."""

import os
from collections.abc import Sequence
from pathlib import Path

from stages.harness.errors import InputError
from stages.inference.engine import Completion, Sampling

GPU_MEMORY = 0.85  # of the card: weights and caches; the rest is for activations and what else runs there
BATCH_INVARIANT_FROM = (9, 0)  # compute capability with kernels whose sums do not follow the batch (Hopper and later)


class VllmEngine:
    """A model folder in memory, in 16 bits; prompts run as many at a time as its caches hold."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where there is no CUDA GPU."""
        import torch

        if not torch.cuda.is_available():
            raise InputError("params.yaml: eval.engine: vllm needs a CUDA GPU and there is none: use transformers")
        if torch.cuda.get_device_capability() >= BATCH_INVARIANT_FROM:
            os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")  # read when vllm is imported
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: one stage, one end
        from transformers import GenerationConfig
        from vllm import LLM

        self.llm = LLM(str(folder), tokenizer=str(folder), gpu_memory_utilization=GPU_MEMORY, seed=0)
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
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in ids], asked)
        return [
            Completion(output.text, "length" if output.finish_reason == "length" else "stop", len(output.token_ids))
            for output in (request.outputs[0] for request in outputs)
        ]
