"""grpo: reinforcement learning with rewards that a program checks (Shao et al. 2024, arXiv 2402.03300), from sft's adapter.

For each prompt a group of answers is sampled; an answer's advantage is how far its reward lies from its group's mean.
Three rewards add up: the whole answer form, each of its tags, and the final answer itself.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus.tokenizer_files import marks_of
from stages.harness import ranks
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.inference.vllm_engine import set_up_vllm
from stages.training.dealing import share_of
from stages.training.memory import Shape
from stages.training.models import frozen_hash, in_32_bits, load_tokenizer
from stages.training.packing import PackedRows
from stages.training.rewards import (
    check_exact_answer,
    check_final_answer,
    distinct,
    match_format_approximately,
    match_format_exactly,
)
from stages.training.rollouts import Rollouts, VllmRollouts, adapter_folder, rollout_trainer
from stages.training.rollouts_apart import engine_bytes, engines_apart, take_gpus
from stages.training.sharding import asked
from stages.training.trainer import Optimisation, arguments, begin, dataset, train

ANSWER_REWARDS = {"graded": check_final_answer, "exact": check_exact_answer}


class Params(Optimisation):
    """trl counts a batch in completions: per_device_batch x accumulation = prompts_per_step x generations."""

    answer_reward: Literal["graded", "exact"]  # is a wrong number paid by how near it is, as in the report
    prompts_per_step: int = Field(gt=0)
    generations: int = Field(gt=1)  # completions a prompt: the group
    max_completion: int = Field(gt=0)  # tokens
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)  # 0: off
    min_p: float | None = Field(ge=0, le=1)
    beta: float = Field(ge=0)  # weight of the KL term against the model that training starts from; 0 holds no such model
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"]
    scale_rewards: Literal["group", "batch", "none"]
    epsilon: float = Field(gt=0)  # clips the probability ratio to 1 +- epsilon
    updates_per_batch: int = Field(gt=0)  # 1: every update is on-policy
    nf4: bool  # hold the trainer's base in 4 bits; vllm samples from its 16 bits
    rollouts: Rollouts
    max_prompt: int = Field(gt=0)  # tokens of the longest prompt; prepare-mix leaves out longer ones
    mask_truncated: bool  # leave completions cut at max_completion out of the loss


def run(p: Params, *, base: Path, adapter: Path, mix: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes the adapter with its tokenizer, and the curve with each reward, spread, length and clipped share."""
    gpus = take_gpus()
    _check(p, apart=bool(gpus))
    by_vllm = p.rollouts.engine == "vllm"
    if by_vllm:
        set_up_vllm(batch_invariant=not p.rollouts.merged)  # the adapter's own kernels add in any order without that mode
    max_length = p.max_prompt + p.max_completion
    backend = begin(p, max_length, checkpoints)
    rank = read_json(adapter / "adapter_config.json")["r"]
    packing = _packing(p, base, rank, max_length, checkpoints, beside=by_vllm and not gpus)
    completions = share_of(p.prompts_per_step * p.generations)
    settings = {
        "precision": p.precision, "rank": rank, "max_length": max_length, "folder": adapter_folder(checkpoints),
        "raw": p.temperature == 1,  # as the trainer's own, which know of no cuts
    }  # fmt: skip
    rollouts = None
    if gpus:
        rollouts = engines_apart(p.rollouts, base, adapter, gpus=gpus, strict=p.strict, completions=completions, **settings)
    from trl import GRPOConfig

    rewards = [match_format_exactly, match_format_approximately, ANSWER_REWARDS[p.answer_reward]]
    model = backend.load_base(base, nf4=p.nf4, lent=by_vllm and not gpus and not p.rollouts.merged)
    model = backend.held_adapter(packing.prepare(model) if packing else model, adapter)
    if packing:
        model = packing.adapted(model)
    tokenizer = load_tokenizer(base, mix / "grpo" / "chat_template.jinja", ends_with=marks_of(base).turn_end)
    if by_vllm and not gpus:
        rollouts = VllmRollouts(p.rollouts, base, requests=completions, **settings)
        if p.rollouts.merged:
            rollouts.merge_into(model)
        elif backend.lends and not p.nf4:
            rollouts.lend_weights(model)
    frozen = frozen_hash(model)
    trainer = rollout_trainer()(
        model=model,
        reward_funcs=[*rewards, distinct],
        args=GRPOConfig(
            **arguments(p, checkpoints) | (packing.arguments if packing else {}),
            **backend.grpo_arguments,
            reward_weights=[1.0] * len(rewards) + [0.0],  # distinct is only watched
            num_generations=p.generations,
            num_iterations=p.updates_per_batch,
            max_completion_length=p.max_completion,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            min_p=p.min_p,
            beta=p.beta,
            loss_type=p.loss,
            scale_rewards=p.scale_rewards,
            epsilon=p.epsilon,
            epsilon_high=p.epsilon,
            mask_truncated_completions=p.mask_truncated,
            vllm_importance_sampling_correction=p.rollouts.importance_correction,
            vllm_importance_sampling_mode="sequence_mask",
            vllm_importance_sampling_clip_max=p.rollouts.importance_cap,
        ),
        train_dataset=dataset(mix / "grpo" / "train.jsonl", ("prompt", "answer")),
        processing_class=tokenizer,
    )
    trainer.rollouts, trainer.packing = rollouts, packing
    in_32_bits(trainer.model)
    try:
        train("grpo", trainer, base=base, checkpoints=checkpoints, out=out, out_curve=out_curve)
        if frozen_hash(model) != frozen:
            raise RuntimeError("the frozen base is not what it was before training")
    finally:
        if rollouts:
            rollouts.close()


def _packing(p: Params, base: Path, rank: int, longest: int, scratch: Path, *, beside: bool) -> PackedRows | None:
    """Micro-batches of completions without padding, in what an engine beside the trainer leaves of the memory."""
    if p.packed is None:
        return None
    engine = engine_bytes(Shape.read(base), p.rollouts, lends=not p.nf4) if beside else 0
    return PackedRows(p, base, scratch, rank=rank, longest=longest, nf4=p.nf4, beside=engine, by_batch=True, whole=True)


def _check(p: Params, *, apart: bool) -> None:
    """Refuses parameters that do not fit together, or not with the processes there are."""
    if apart and p.rollouts.engine != "vllm":
        raise InputError("params.yaml: run.rollout_gpus gives GPUs to grpo's engines, and transformers samples in the trainer: "
                         "set it to 0, or grpo.rollouts.engine to vllm")  # fmt: skip
    if p.loss == "bnpo" and ranks.size() > 1:
        raise InputError("params.yaml: grpo.loss: bnpo is a mean over what a process computes at once, another with each number of them: "
                         "set run.processes and run.nodes to 1, or take dapo")  # fmt: skip
    if asked():
        raise InputError("params.yaml: run.sharded is true, and grpo samples from the whole of its base: set it to null")
    if p.per_device_batch * p.accumulation != p.prompts_per_step * p.generations:
        raise InputError(
            f"params.yaml: grpo: per_device_batch x accumulation ({p.per_device_batch} x {p.accumulation}) must be "
            f"prompts_per_step x generations ({p.prompts_per_step} x {p.generations}): change one of them"
        )
    if p.backend == "unsloth" and (p.beta > 0 or p.loss in ("dr_grpo", "bnpo")):
        raise InputError(
            "params.yaml: grpo.backend: unsloth measures beta's divergence from the bare base and reads the losses dr_grpo and bnpo "
            "in its own way: set beta to 0 and loss to grpo or dapo, or use transformers"
        )
    if p.rollouts.engine == "vllm" and p.rollouts.merged and p.nf4:
        raise InputError("params.yaml: grpo.rollouts.merged adds the adapter to the trainer's base in 16 bits: set nf4 to false, or merged")
    cuts = p.top_p < 1 or p.top_k > 0 or bool(p.min_p)
    if p.rollouts.engine == "vllm" and p.rollouts.importance_correction and cuts and p.temperature != 1:
        raise InputError(
            "params.yaml: grpo.rollouts.importance_correction compares with tokens drawn from the whole distribution or at "
            "temperature 1: set temperature to 1, or top_p to 1, top_k to 0 and min_p to null, or switch it off"
        )
