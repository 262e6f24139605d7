"""sft: a short supervised run that teaches the tagged answer form, the warm start from which grpo learns.

LoRA on the 16-bit base, ChatML with a system message that asks for the form, loss on the assistant's tokens alone. Its
work is done as soon as answers come in that form: `stop` ends it there, and leaves the arithmetic to grpo.
"""

from pathlib import Path

from pydantic import Field

from stages.corpus.tokenizer_files import marks_of
from stages.training.models import Lora, load_tokenizer
from stages.training.packing import layout
from stages.training.stopping import StopAtForm, stop_at_form
from stages.training.supervised import supervised_trainer
from stages.training.trainer import Optimisation, arguments, begin, dataset, train


class Params(Optimisation):
    """See params/report-t4.yaml for the report's values."""

    lora: Lora
    max_length: int = Field(gt=0)  # tokens; prepare-mix drops longer rows
    stop: StopAtForm


def run(p: Params, *, base: Path, mix: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes the adapter with its tokenizer, and the training curve."""
    backend = begin(p, p.max_length, checkpoints)
    from trl import SFTConfig

    rows = layout(p, base, checkpoints)
    model = rows.adapted(backend.new_adapter(rows.prepare(backend.load_base(base, sharded=rows.sharded)), p.lora))
    tokenizer = load_tokenizer(base, mix / "sft" / "chat_template.jinja", ends_with=marks_of(base).turn_end)
    trainer = supervised_trainer(rows)(
        model=model,
        args=SFTConfig(
            **arguments(p, checkpoints) | rows.arguments,
            max_length=p.max_length,
            assistant_only_loss=True,
            packing=False,
            padding_free=False,
            loss_type="nll",
        ),
        data_collator=rows.collator,
        train_dataset=dataset(mix / "sft" / "train.jsonl", ("messages",)),
        processing_class=tokenizer,
    )
    if p.stop.share is not None:
        trainer.add_callback(stop_at_form(p.stop, trainer, mix / "sft" / "validation.jsonl", together=rows.sharded))
    train("sft", trainer, base=base, checkpoints=checkpoints, out=out, out_curve=out_curve)
