"""qlora: the long supervised run of the report (Dettmers et al. 2023): LoRA on a base held in 4-bit NF4.

ChatML without a system message, on reasoning and chat rows; loss on the assistant's tokens alone. Validation loss stops
it early, and the best checkpoint is what stays.
"""

from pathlib import Path

from pydantic import Field

from stages.corpus.tokenizer_files import marks_of
from stages.harness import measures
from stages.training.models import Lora, in_32_bits, load_tokenizer
from stages.training.packing import layout
from stages.training.supervised import supervised_trainer
from stages.training.trainer import Optimisation, arguments, begin, dataset, train


class Params(Optimisation):
    """See params/report-t4.yaml for the report's values."""

    lora: Lora
    max_length: int = Field(gt=0)  # tokens; prepare-mix drops longer rows
    eval_every: int = Field(gt=0)  # steps; save_every must be a multiple of it, so that the best checkpoint is there
    early_stopping_patience: int = Field(gt=0)  # evaluations without a better validation loss


def run(p: Params, *, base: Path, mix: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes the best adapter with its tokenizer, and the training curve."""
    backend = begin(p, p.max_length, checkpoints)
    from transformers import EarlyStoppingCallback
    from trl import SFTConfig

    rows = layout(p, base, checkpoints, nf4=True)
    model = rows.adapted(backend.new_adapter(rows.prepare(backend.load_base(base, nf4=True, sharded=rows.sharded)), p.lora))
    tokenizer = load_tokenizer(base, mix / "qlora" / "chat_template.jinja", ends_with=marks_of(base).turn_end)
    trainer = supervised_trainer(rows)(
        model=model,
        args=SFTConfig(
            **arguments(p, checkpoints) | rows.arguments,
            max_length=p.max_length,
            assistant_only_loss=True,
            packing=False,
            padding_free=False,
            loss_type="nll",
            eval_strategy="steps",
            eval_steps=p.eval_every,
            per_device_eval_batch_size=rows.rows,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
        ),
        data_collator=rows.collator,
        train_dataset=dataset(mix / "qlora" / "train.jsonl", ("messages",)),
        eval_dataset=dataset(mix / "qlora" / "validation.jsonl", ("messages",)),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(p.early_stopping_patience)],
    )
    in_32_bits(trainer.model)
    train("qlora", trainer, base=base, checkpoints=checkpoints, out=out, out_curve=out_curve)
    measures.note(best_step=trainer.state.best_global_step)
