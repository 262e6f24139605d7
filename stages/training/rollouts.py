"""Rollouts by vLLM beside the trainer, in one process on one GPU; the engine gets the adapter and nothing else.

trl's own way merges the adapter into the base, copies every weight over and takes the adapter out again, and in 16 bits
the frozen base drifts with each such step (trl issue 5975). Here the engine reads the adapter from a folder under a new
name each step, so that nothing cached of an older adapter is taken for the new one's, and can lend the trainer its base.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.inference.vllm_engine import Vllm, start_vllm
from stages.training.models import DTYPES, Precision

ADAPTER_RANKS = (8, 16, 32, 64, 128, 256)  # that vLLM has room for (vllm.config.lora.MaxLoRARanks)
BATCHED_TOKENS = 4096  # that a step of the engine computes at once; more would take memory from the trainer


class Rollouts(Vllm):
    """Who samples the completions: transformers anywhere, vllm on a CUDA GPU."""

    engine: Literal["transformers", "vllm"]
    importance_correction: bool  # vllm: weigh each completion by how likely the trainer's own arithmetic finds it
    importance_cap: float = Field(gt=1)  # weights above it leave the whole completion out of the loss


class VllmRollouts:
    """A vLLM engine that samples from the base with the adapter as it stands."""

    def __init__(
        self, p: Rollouts, base: Path, *, precision: Precision, rank: int, max_length: int, requests: int, raw: bool, scratch: Path
    ) -> None:
        """Starts the engine, which seeds torch: seed again afterwards.

        max_length: tokens of prompt and completion. requests: completions a step. raw: give log-probabilities of the
        model's own distribution, not of what temperature and cuts make of it. scratch: a folder for the adapter.
        """
        self.adapter = scratch.resolve() / "rollouts"
        self.llm = start_vllm(
            base,
            p,
            dtype=DTYPES[precision],
            enable_lora=True,
            max_lora_rank=next(size for size in ADAPTER_RANKS if size >= rank),
            max_model_len=max_length,
            max_num_seqs=requests,
            max_num_batched_tokens=max(BATCHED_TOKENS, max_length),
            logprobs_mode="raw_logprobs" if raw else "processed_logprobs",
            generation_config="vllm",  # stop tokens are named below
        )

    def lend_weights(self, model) -> None:
        """Makes the frozen weights of a model on the CPU the engine's own memory, so that the base is held once.

        Raises RuntimeError where a weight is not the engine's, bit for bit.
        """
        import torch

        packing, held = self.llm.apply_model(_weights)[0]
        taken: dict[str, int] = {}  # rows of each of the engine's weights that the trainer's own names have used so far
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                continue
            *path, module, kind = name.removeprefix("base_model.model.").replace(".base_layer", "").split(".")
            packed = next((whole for whole, parts in packing.items() if module in parts), module)
            place = ".".join((*path, packed, kind))
            start = taken.get(place, 0)
            taken[place] = start + len(weight)
            lent = held[place][start : start + len(weight)]
            if not torch.equal(lent, weight.to(lent.device)):
                raise RuntimeError(f"vLLM holds another {name} than the trainer")
            weight.data = lent
        model.to("cuda")

    def generate(self, prompts: Sequence[Sequence[int]], model, *, step: int, seed: int, stop: int, **sampling):
        """One completion for each prompt (token ids), with the log-probability of each of its tokens in nats.

        Each is drawn with a seed of its own from the run's seed, the step and its place: completions of a group differ,
        and a second run draws the same. `sampling`: max_tokens, temperature, top_p, top_k, min_p.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        shutil.rmtree(self.adapter, ignore_errors=True)
        model.save_pretrained(self.adapter, selected_adapters=["default"])
        asked = [
            SamplingParams(
                seed=_seed(seed, step, place), stop_token_ids=[stop], ignore_eos=True, logprobs=0, detokenize=False, **sampling
            )
            for place in range(len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            asked,
            use_tqdm=False,
            lora_request=LoRARequest(f"step-{step}", step + 1, str(self.adapter)),
        )
        drawn = [output.outputs[0] for output in outputs]
        ids = [list(output.token_ids) for output in drawn]
        logprobs = [
            [position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True)]
            for output in drawn
        ]
        return ids, logprobs

    def close(self) -> None:
        """Ends the engine, and with it the memory that it lends."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def _seed(seed: int, step: int, place: int) -> int:
    """63 bits that differ for each completion of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()[:8]) >> 1


def _weights(model):
    """How vLLM packs weights (its name -> names of the parts, in rows one after another), and the weights by plain names."""
    return model.packed_modules_mapping, {name.replace(".base_layer", ""): weight.data for name, weight in model.named_parameters()}


def rollout_trainer():
    """trl's GRPOTrainer as a class that leaves the sampling to its `rollouts` where it has been given any.

    trl then weighs the tokens as its arguments say: they were drawn by other arithmetic than the trainer's.
    """
    from trl import GRPOTrainer

    class RolloutTrainer(GRPOTrainer):
        rollouts: VllmRollouts | None = None

        def _generate_single_turn(self, prompt_ids, *others, **more):
            if self.rollouts is None:
                return super()._generate_single_turn(prompt_ids, *others, **more)
            self.use_vllm = True  # only from here on: to the constructor it would mean an engine of trl's own
            return self.rollouts.generate(
                prompt_ids,
                self.accelerator.unwrap_model(self.model),
                step=self.state.global_step,
                seed=self.args.seed,
                stop=self.processing_class.eos_token_id,
                max_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k or 0,
                min_p=self.min_p or 0.0,
            )

    return RolloutTrainer
