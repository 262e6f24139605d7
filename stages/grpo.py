"""grpo: reinforcement learning with rewards that a program checks (Shao et al. 2024, arXiv 2402.03300), from sft's adapter.

For each prompt a group of answers is sampled; an answer's advantage is how far its reward lies from its group's mean.
Three rewards add up: the whole answer form, each of its tags, and the final answer itself.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus.marks import TURN_END
from stages.harness.errors import InputError
from stages.training.rewards import (
    check_exact_answer,
    check_final_answer,
    distinct,
    match_format_approximately,
    match_format_exactly,
)
from stages.training.trainer import Optimisation, arguments, dataset, train

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
    mask_truncated: bool  # leave completions cut at max_completion out of the loss


def run(p: Params, *, base: Path, adapter: Path, mix: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes the adapter with its tokenizer, and the curve with each reward, spread, length and clipped share."""
    if p.per_device_batch * p.accumulation != p.prompts_per_step * p.generations:
        raise InputError(
            f"params.yaml: grpo: per_device_batch x accumulation ({p.per_device_batch} x {p.accumulation}) must be "
            f"prompts_per_step x generations ({p.prompts_per_step} x {p.generations}): change one of them"
        )
    from peft import PeftModel
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    from stages.training.models import load_base, load_tokenizer

    rewards = [match_format_exactly, match_format_approximately, ANSWER_REWARDS[p.answer_reward]]
    set_seed(p.seed)
    tokenizer = load_tokenizer(base, mix / "grpo" / "chat_template.jinja", ends_with=TURN_END)
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(load_base(base), adapter, is_trainable=True),
        reward_funcs=[*rewards, distinct],
        args=GRPOConfig(
            **arguments(p, checkpoints),
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
            mask_truncated_completions=p.mask_truncated,
        ),
        train_dataset=dataset(mix / "grpo" / "train.jsonl", ("prompt", "answer")),
        processing_class=tokenizer,
    )
    train("grpo", trainer, checkpoints=checkpoints, out=out, out_curve=out_curve)
