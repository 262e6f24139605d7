"""When sft ends: at the first look at validation questions whose answers come in the taught form."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from stages.corpus.chat_format import render
from stages.harness import measures, ranks
from stages.harness.jsonl import read_rows
from stages.harness.params import StageParams
from stages.inference.engine import Sampling
from stages.training.rewards import match_format_exactly


class StopAtForm(StageParams):
    """Every `every` steps `problems` validation questions are answered greedily; `share` of answers in form ends training."""

    share: float | None = Field(gt=0, le=1)  # null: training takes all its steps
    every: int = Field(gt=0)
    problems: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)


def in_form(completions: Sequence[str]) -> float:
    """The share of completions that have the whole answer form, each tag once and nothing beside: 0..1."""
    return sum(reward > 0 for reward in match_format_exactly(completions)) / len(completions)


def stop_at_form(p: StopAtForm, trainer, validation: Path, *, together: bool):
    """A trainer callback that looks at the answers to the first rows of `validation` and logs the share as `form`.

    together: every process answers, as each has but its share of the base; else the first does.
    """
    from copy import copy

    from torch.random import fork_rng
    from transformers import TrainerCallback

    from stages.inference.transformers_engine import TransformersEngine

    tokenizer = copy(trainer.processing_class)
    tokenizer.padding_side = "left"
    questions = [row["messages"][0]["content"] for row, _ in zip(read_rows(validation), range(p.problems))]
    prompts = [render(tokenizer.chat_template, question) for question in questions]

    class Callback(TrainerCallback):
        def share_in_form(self):
            engine = TransformersEngine(trainer.model.eval(), tokenizer, p.problems)
            with fork_rng():
                answers = engine.generate(prompts, Sampling(p.max_new_tokens))
            getattr(trainer.model, "for_training", trainer.model.train)()  # unsloth's switches more than a flag
            return in_form([answer.text for answer in answers])

        def on_step_end(self, args, state, control, **_):
            if state.global_step % p.every == 0:
                share = ranks.told(self.share_in_form() if together or ranks.is_first() else None)
                due = control.should_log
                trainer.log({"form": share})
                control.should_log = due  # trl's own log of this step is still to come
                measures.note(form=share)
                control.should_training_stop |= share >= p.share

    return Callback()
