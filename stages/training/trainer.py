"""What the trainers of all methods share: arguments in the same words, resuming after a kill, and what is left behind."""

import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from stages.harness import measures, ranks
from stages.harness.arithmetic import read_work_space_once, use_strict_kernels
from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows
from stages.harness.params import StageParams
from stages.training.checkpoints import sealer, where_all_go_on
from stages.training.curves import LIVE, Curve, recorder
from stages.training.dealing import micro_batches, share_of
from stages.training.models import Precision, save_adapter
from stages.training.optimizers import keep_up
from stages.training.packing import Packed
from stages.training.sharding import alongside, is_part


class Optimisation(StageParams):
    """How weights are updated, in every training stage alike; the batch is per_device_batch x accumulation."""

    seed: int
    backend: Literal["transformers", "unsloth"]  # whose models and kernels; the adapter is laid out alike
    precision: Precision  # of the base and of products; fp16 scales its losses; the adapter is always held in 32 bits
    strict: bool  # on a GPU: only kernels whose bits come again
    lr: float = Field(gt=0)
    scheduler: Literal["linear", "cosine", "constant"]
    warmup_ratio: float = Field(ge=0, lt=1)
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    per_device_batch: int = Field(gt=0)
    accumulation: int = Field(gt=0)
    max_steps: int = Field(ge=-1)  # -1: as many as the epochs make
    epochs: float = Field(gt=0)
    gradient_checkpointing: bool
    packed: Packed | None  # null: rows, completions or pairs are padded; a row of orpo is both answers of a pair
    log_every: int = Field(gt=0)
    save_every: int = Field(gt=0)


def begin(p: Optimisation, max_length: int, scratch: Path):
    """Seeds everything and returns the backend that loads models: Transformers or Unsloth.

    To be called before trl is imported, which unsloth rewrites, and before an adapter is drawn, for which trl seeds too
    late. `max_length` is that of the longest row, in tokens; what a backend compiles goes to `scratch`.
    """
    share_of(p.per_device_batch * p.accumulation)  # before anything is loaded
    if p.packed:  # each batch has a length of its own; torch reads this when a library first looks at the GPU
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if p.backend == "unsloth":
        if ranks.size() > 1:
            raise InputError("params.yaml: backend: unsloth trains in one process: set run.processes and run.nodes to 1, or use transformers")
        from stages.training.unsloth_backend import Unsloth

        backend = Unsloth(p.precision, p.seed, p.gradient_checkpointing, max_length, scratch)
    else:
        from stages.training.models import Transformers

        backend = Transformers(p.precision)
    from transformers import set_seed

    ranks.meet()
    use_strict_kernels(p.strict)
    set_seed(p.seed)
    return backend


def arguments(p: Optimisation, checkpoints: Path) -> dict[str, Any]:
    """TrainingArguments that every method passes to its trl config.

    Checkpoints go to the scratch folder; nothing is reported anywhere but to our own curve.
    """
    import torch

    return {
        "output_dir": str(checkpoints),
        "seed": p.seed,
        "learning_rate": p.lr,
        "lr_scheduler_type": p.scheduler,
        "warmup_steps": p.warmup_ratio,  # transformers 5 reads a number below 1 as a ratio
        "optim": p.optimizer,
        "weight_decay": p.weight_decay,
        "max_grad_norm": p.max_grad_norm,
        **micro_batches(p.per_device_batch * p.accumulation, p.per_device_batch),
        "max_steps": p.max_steps,
        "num_train_epochs": p.epochs,
        "gradient_checkpointing": p.gradient_checkpointing,
        "logging_steps": p.log_every,
        "logging_nan_inf_filter": False,  # asks after every batch, for which the host waits; and a loss that is no number should be seen
        "save_steps": p.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": p.precision == "bf16",
        "fp16": p.precision == "fp16",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # else the host waits for the last update before each batch
        **({"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False} if ranks.size() > 1 else {}),  # all train, and buffers stay
    }


def dataset(path: Path, columns: tuple[str, ...]):
    """The named columns of a JSON Lines file as a Dataset, held in memory."""
    from datasets import Dataset

    rows = list(read_rows(path))
    return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})


def train(stage: str, trainer, *, base: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Trains from the last whole checkpoint of a killed run of the same key, or from the start.

    The first process writes the adapter with its tokenizer to `out` and what the trainer logged to `out_curve`; notes steps, the
    seconds that they took and the tokens of the rows that were read.
    """
    from transformers.trainer_callback import PrinterCallback

    curve = Curve(checkpoints / LIVE if ranks.is_first() else None)
    trainer.remove_callback(PrinterCallback)  # our own callback shows progress
    trainer.add_callback(recorder(curve, stage, trainer.args.max_steps))
    trainer.add_callback(sealer())
    trainer.add_callback(pace())
    alongside(trainer)
    walk_once(trainer.model)
    keep_up(trainer)
    end_where_it_ended(trainer)
    trainer.floating_point_ops = lambda inputs: 0  # counts parameters anew for each batch, and nobody reads it
    read_work_space_once()
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=where_all_go_on(checkpoints))
    measures.note(training_seconds=round(time.monotonic() - started, 2))
    if not ranks.is_first():
        return
    save_adapter(trainer.model, trainer.processing_class, base, out)
    curve.write(out_curve)
    measures.note(steps=trainer.state.global_step, tokens=_tokens(trainer))


def walk_once(model) -> None:
    """Remembers a model's parameters, and sets a mode only where the last one set was another.

    A trainer does both several times an update, and each walk through the thousands of modules of a model with adapters takes 10 ms. Of a
    base that is shared out it is shown nothing: none of it is trained, and accelerate refuses data parallelism beside what it sees of one.
    """
    parameters, set_mode, last = [weight for weight in model.parameters() if not is_part(weight)], model.train, None

    def train(mode: bool = True):
        nonlocal last
        if mode != last:
            set_mode(mode)
            last = mode
        return model

    model.parameters = lambda recurse=True: iter(parameters)
    model.train = train


def end_where_it_ended(trainer) -> None:
    """Has a run that was killed after its last checkpoint train no more; transformers (5.17) would make one update beyond the last."""
    run_epoch = trainer._run_epoch

    def rest_of_epoch(**arguments):
        state = trainer.state
        if state.global_step < state.max_steps and not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            run_epoch(**arguments)

    trainer._run_epoch = rest_of_epoch


def pace():
    """A trainer callback that notes the seconds from one update's begin to the next one's, as their median.

    So neither what compiles at the start counts nor a look at validation rows, but all that a GPU still has to do when its host is done.
    """
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.begun: list[float] = []

        def on_step_begin(self, *_, **__):
            self.begun.append(time.monotonic())

        def on_train_end(self, *_, **__):
            if seconds := [later - earlier for earlier, later in pairwise(self.begun)]:
                measures.note(update_seconds=round(median(seconds), 4))

    return Pace()


def _tokens(trainer) -> int:
    """As trl counts them; else (orpo, and sft by unsloth) as the rows hold them, prompts included."""
    if counted := max((log.get("num_tokens", 0) for log in trainer.state.log_history), default=0):
        return int(counted)
    rows = trainer.train_dataset
    held = [name for name in rows.column_names if name in ("input_ids", "chosen_input_ids", "rejected_input_ids")]
    return round(sum(len(ids) for name in held for ids in rows[name]) * trainer.state.epoch)
