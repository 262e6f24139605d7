"""Rollouts by vLLM beside the trainer, in one process on one GPU; the engine gets the adapter and nothing else.

Several processes that train together have an engine each, which samples for its process's share of the prompts.

trl's own way merges the adapter into the base, copies every weight over and takes the adapter out again, and in 16 bits
the frozen base drifts with each such step (trl issue 5975). Here the trainer's base is never touched. `merged`: the engine's own
weights become base plus adapter, each step anew from the trainer's base, where they lie, so that its CUDA graphs see them. Else
the engine reads the adapter from a folder under a new name each step, so that nothing cached of an older adapter is taken for
the new one's, and can lend the trainer its base: slower, and without a second copy of the weights.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.harness import ranks
from stages.inference.vllm_engine import Vllm, start_vllm
from stages.training.dealing import by_wrapper
from stages.training.logprobs import packed_logprobs
from stages.training.models import DTYPES, Precision
from stages.training.packing import PackedRows

ADAPTER_RANKS = (8, 16, 32, 64, 128, 256)  # that vLLM has room for (vllm.config.lora.MaxLoRARanks)
BATCHED_TOKENS = 4096  # that a step of the engine computes at once; more would take memory from the trainer


class Rollouts(Vllm):
    """Who samples the completions: transformers anywhere, vllm on a CUDA GPU."""

    engine: Literal["transformers", "vllm"]
    merged: bool  # vllm: add the adapter into weights of the engine's own, which takes as much memory as the base and half as long
    importance_correction: bool  # vllm: weigh each completion by how likely the trainer's own arithmetic finds it
    importance_cap: float = Field(gt=1)  # weights above it leave the whole completion out of the loss


class VllmRollouts:
    """A vLLM engine that samples from the base with the adapter as it stands."""

    def __init__(
        self, p: Rollouts, base: Path, *, precision: Precision, rank: int, max_length: int, requests: int, raw: bool, folder: Path
    ) -> None:
        """Starts the engine, which seeds torch: seed again afterwards.

        max_length: tokens of prompt and completion. requests: completions a step. raw: give log-probabilities of the
        model's own distribution, not of what temperature and cuts make of it. folder: where the adapter lies.
        """
        self.adapter = folder
        self.merged: list[_Merged] = []
        beside = {} if p.merged else {
            "enable_lora": True, "max_lora_rank": next(size for size in ADAPTER_RANKS if size >= rank),
        }  # fmt: skip
        if ranks.size() > 1:
            # An engine alone on this process's GPU, and no part of one with the others'. It takes over the processes that have met, and
            # all of them must start theirs, for vLLM has them form groups, even of one.
            beside["distributed_executor_backend"] = "external_launcher"
        self.llm = start_vllm(
            base,
            p,
            dtype=DTYPES[precision],
            **beside,
            requests=requests,
            max_model_len=max_length,
            max_num_batched_tokens=max(BATCHED_TOKENS, max_length),
            logprobs_mode="raw_logprobs" if raw else "processed_logprobs",
            generation_config="vllm",  # stop tokens are named below
        )

    def lend_weights(self, model) -> None:
        """Makes the frozen weights of a model on the CPU the engine's own memory, so that the base is held once.

        Raises RuntimeError where a weight is not the engine's, bit for bit.
        """
        import torch

        rows_of = self._rows()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                continue
            lent = rows_of(name, len(weight))
            if not torch.equal(lent, weight.to(lent.device)):
                raise RuntimeError(f"vLLM holds another {name} than the trainer")
            weight.data = lent
        model.to("cuda")

    def merge_into(self, model) -> None:
        """Takes note of where the adapter of each of the model's linear layers goes in the engine."""
        rows_of = self._rows()
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A") and "default" in layer.lora_A:
                base = layer.base_layer.weight
                self.merged.append(_Merged(rows_of(f"{name}.weight", len(base)), base, layer))

    def _rows(self):
        """A function from a name of the trainer's and its number of rows to those rows in the engine, each to be asked for once, in order."""
        packing, held = self.llm.apply_model(_weights)[0]
        taken: dict[str, int] = {}  # rows of each of the engine's weights that the trainer's own names have used so far

        def rows_of(name: str, count: int):
            *path, module, kind = name.removeprefix("base_model.model.").replace(".base_layer", "").split(".")
            packed = next((whole for whole, parts in packing.items() if module in parts), module)
            place = ".".join((*path, packed, kind))
            start = taken.get(place, 0)
            taken[place] = start + count
            return held[place][start : start + count]

        return rows_of

    def generate(self, prompts: Sequence[Sequence[int]], model, *, step: int, first: int, seed: int, stop: int, **sampling):
        """One completion for each prompt (token ids), with the log-probability of each of its tokens in nats.

        Each is drawn with a seed of its own from the run's seed, the step and its place among the prompts of all processes: completions
        of a group differ, and a second run draws the same. first: the place of the first of these prompts. model: None where its
        adapter lies in the folder already. `sampling`: max_tokens, temperature, top_p, top_k, min_p.
        """
        from vllm import SamplingParams

        request = self._bring(model, step)
        asked = [
            SamplingParams(
                seed=_seed(seed, step, first + place), stop_token_ids=[stop], ignore_eos=True, detokenize=False,
                logprobs=0, flat_logprobs=True, **sampling,
            )  # fmt: skip
            for place in range(len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            asked,
            use_tqdm=False,
            lora_request=request,
        )
        drawn = [output.outputs[0] for output in outputs]
        return [list(output.token_ids) for output in drawn], [list(output.logprobs.logprobs) for output in drawn]

    def _bring(self, model, step: int):
        """The adapter as it stands into the engine; returns what to ask for it with, if anything."""
        if self.merged:
            for each in self.merged:
                each.add()
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept what an older adapter had computed")
            return None
        from vllm.lora.request import LoRARequest

        if model is not None:
            write_adapter(model, self.adapter)
        return LoRARequest(f"step-{step}", step + 1, str(self.adapter))

    def close(self) -> None:
        """Ends the engine, and with it the memory that it lends; of several processes' their own end does so.

        vLLM would take leave of the other processes, for which NCCL waits until they do too: for ever, where one has failed.
        """
        if ranks.size() > 1:
            return
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.merged


@dataclass(frozen=True)
class _Merged:
    """Rows of an engine's weight, the trainer's base for them, and the layer that holds their adapter."""

    rows: Any
    base: Any
    layer: Any

    def add(self) -> None:
        """Writes base plus adapter, summed in 32 bits and rounded once."""
        import torch

        with torch.no_grad():
            a, b = (self.layer.get_submodule(part)["default"].weight.to(self.base.dtype) for part in ("lora_A", "lora_B"))
            torch.addmm(self.base, b, a, alpha=self.layer.scaling["default"], out=self.rows)


def adapter_folder(scratch: Path) -> Path:
    """Where a trainer puts its adapter for an engine: each has its own, which is written anew whenever that engine wants it."""
    return scratch.resolve() / "rollouts" / str(ranks.rank())


def write_adapter(model, folder: Path) -> None:
    """The adapter as it stands, in the form that vLLM reads."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, selected_adapters=["default"])


def _seed(seed: int, step: int, place: int) -> int:
    """63 bits that differ for each completion of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()[:8]) >> 1


def _weights(model):
    """How vLLM packs weights (its name -> names of the parts, in rows one after another), and the weights by plain names."""
    return model.packed_modules_mapping, {name.replace(".base_layer", ""): weight.data for name, weight in model.named_parameters()}


def _prompts_in_common(prompts, mask):
    """For each row the first one with the same prompt, and how many of its tokens that one computes for it: all of the prompt, or none."""
    import torch

    lenders = (prompts[:, None] == prompts[None]).all(-1).int().argmax(1)
    tokens = mask[:, : prompts.shape[1]].sum(1).clamp(max=mask.sum(1) - 1)  # of a completion that is masked one token is left
    return lenders, torch.where(lenders == torch.arange(len(prompts), device=prompts.device), 0, tokens)


def rollout_trainer():
    """trl's GRPOTrainer as a class that leaves the sampling to its `rollouts`, and completions unpadded to its `packing`, if given any.

    trl weighs sampled tokens as its arguments say: they were drawn by other arithmetic than the trainer's.
    """
    import torch
    from trl import GRPOTrainer

    class RolloutTrainer(GRPOTrainer):
        rollouts: Any = None  # VllmRollouts, or RolloutsApart
        packing: PackedRows | None = None
        known = None  # token ids, log-probabilities and entropies that the loss will ask for again

        def _generate_single_turn(self, prompt_ids, *others, **more):
            if self.rollouts is None:
                return super()._generate_single_turn(prompt_ids, *others, **more)
            self.use_vllm = True  # only from here on: to the constructor it would mean an engine of trl's own
            return self.rollouts.generate(
                prompt_ids,
                self.accelerator.unwrap_model(self.model),
                step=self.state.global_step,
                first=ranks.rank() * len(prompt_ids),  # trl deals rows out so: the first process has the first of them
                seed=self.args.seed,
                stop=self.processing_class.eos_token_id,
                max_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k or 0,
                min_p=self.min_p or 0.0,
            )

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *others, **more):
            """As trl's, for packed rows without padding.

            To weigh what vLLM drew, trl asks for log-probabilities before the update, and in it once more. Where the update is of all
            completions at once, and the first, they are the same: what the first time computed is what the loss gets.
            """
            if self.packing is None:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, *others, **more
                )
            if self.known is not None:
                before, *figures = self.known
                self.known = None
                order = (input_ids[:, None] == before[None]).all(-1).int().argmax(1)  # trl shuffles the rows
                return *(figure[order] for figure in figures), None
            once = (
                self.model.training and not torch.is_grad_enabled() and self.beta == 0
                and self.num_iterations == self.args.steps_per_generation == 1
            )  # fmt: skip
            parts = zip(input_ids.split(batch_size or len(input_ids)), attention_mask.split(batch_size or len(input_ids)), strict=True)
            with torch.set_grad_enabled(torch.is_grad_enabled() or once), self.accelerator.autocast():
                found = [self._packed(model, *part, logits_to_keep) for part in parts]
                logprobs, entropies = (torch.cat(each) for each in zip(*found, strict=True))
            if once:
                self.known = input_ids, logprobs, entropies
                logprobs = logprobs.detach()
            return logprobs, entropies, None

        def _packed(self, model, input_ids, attention_mask, kept):
            adapted = self.accelerator.unwrap_model(model)
            base = adapted.get_base_model()
            lenders, lent = _prompts_in_common(input_ids[:, :-kept], attention_mask)
            self.packing.make_room(base.get_decoder(), attention_mask, lent)

            def forward():
                return packed_logprobs(
                    base.get_decoder(),
                    base.get_output_embeddings().weight,
                    input_ids,
                    attention_mask,
                    torch.arange(input_ids.shape[1], device=input_ids.device) >= input_ids.shape[1] - kept,
                    lenders,
                    lent,
                    temperature=self.temperature,
                    longest=self.packing.longest,
                    compiled=self.packing.p.compile,
                )

            wrapper = self.model_wrapped if torch.is_grad_enabled() else adapted
            logprobs, entropies = by_wrapper(wrapper, adapted, forward, input_ids)
            return logprobs[:, -kept:], entropies[:, -kept:]

    return RolloutTrainer
