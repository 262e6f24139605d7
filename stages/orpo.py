"""orpo: one supervised run that also pushes a worse answer away (Hong et al. 2024, arXiv 2403.07691).

Its loss is that of the chosen answer plus `beta` times the log odds of chosen over rejected; no reference model. Prompts
are in the Alpaca form. The likelihood term of trl's trainer covers prompt and answer.
"""

from pathlib import Path

from pydantic import Field

from stages.corpus.tokenizer_files import marks_of
from stages.training.models import Lora, load_tokenizer
from stages.training.packing import layout
from stages.training.pairs import pair_trainer
from stages.training.trainer import Optimisation, arguments, begin, dataset, train


class Params(Optimisation):
    """See params/report-t4.yaml for the report's values."""

    lora: Lora
    beta: float = Field(gt=0)  # weight of the odds-ratio term
    max_length: int = Field(gt=0)  # tokens of prompt and answer; preference-pairs drops longer pairs


def run(p: Params, *, base: Path, pairs: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes the adapter with its tokenizer, and the training curve."""
    backend = begin(p, p.max_length, checkpoints)
    rows = layout(p, base, checkpoints, answers=2)
    from trl.experimental.orpo import ORPOConfig

    model = rows.adapted(backend.new_adapter(rows.prepare(backend.load_base(base, sharded=rows.sharded)), p.lora))
    tokenizer = load_tokenizer(base, pairs / "chat_template.jinja", ends_with=marks_of(base).text_end)
    trainer = pair_trainer()(
        model=model,
        args=ORPOConfig(
            **arguments(p, checkpoints) | rows.arguments,
            beta=p.beta,
            max_length=p.max_length,
            remove_unused_columns=False,
        ),
        train_dataset=dataset(pairs / "train.jsonl", ("prompt", "chosen", "rejected")),
        processing_class=tokenizer,
    )
    trainer.packing, trainer.together = rows if p.packed else None, p.per_device_batch
    train("orpo", trainer, base=base, checkpoints=checkpoints, out=out, out_curve=out_curve)
