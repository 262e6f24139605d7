"""Rollouts by engines in processes of their own, on GPUs of their own, while the trainers have the others.

The first trainer of a machine asks its machine's engines for the completions of all its trainers: each engine gets as many prompts, one
after another in the order of all, and draws each completion with the seed of its place, as an engine beside a trainer would.
Before that they are brought the adapter, through files. Engines and trainers take turns: what is trained on was drawn from what is trained.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stages.harness import measures, ranks
from stages.harness.apart import Apart, answers
from stages.harness.arithmetic import use_portable_arithmetic, use_strict_kernels
from stages.harness.jsonl import read_json
from stages.inference.vllm_engine import set_up_vllm
from stages.training.memory import GIB, Shape
from stages.training.models import DTYPES, Precision, Transformers
from stages.training.packing import needs_of
from stages.training.rollouts import Rollouts, VllmRollouts, write_adapter

GPUS = "MATHMIND_ROLLOUT_GPUS"  # how many of the GPUs that are seen the engines have alone: docker/run says so
TRAINED = "trained.safetensors"  # the adapter's weights by the trainer's names, where an engine adds them to a base of its own


def take_gpus() -> list[str]:
    """The last of the GPUs, which the engines have alone; this process sees the others only, if it has not asked CUDA yet."""
    if not (count := int(os.environ.get(GPUS, "0"))):
        return []
    seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[:-count])
    measures.note(rollout_gpus=count)
    return seen[-count:]


class RolloutsApart:
    """What VllmRollouts is to one trainer, for all of a machine."""

    def __init__(self, make: Callable[[], Any], gpus: Sequence[str], bring: Callable[[Any], None]) -> None:
        """make: returns an engine, in each of their processes; bring: puts a model's adapter where engines look for it."""
        self.bring = bring
        self.engines = [Apart(make, gpu=gpu, name=f"engine on GPU {gpu}") for gpu in gpus] if ranks.local_rank() == 0 else []
        for engine in self.engines:
            engine.ask("ready")  # they start while this process loads its own model
        self.starting = list(self.engines)

    def generate(self, prompts: Sequence[Sequence[int]], model, *, first: int, **asked):
        """See VllmRollouts. All trainers must ask, for equally many."""
        everybodys = ranks.everybody(prompts)
        leader = ranks.rank() - ranks.local_rank()  # of this machine
        drawn = None
        if self.engines:
            own = list(chain.from_iterable(everybodys[leader : leader + ranks.local_size()]))
            drawn = self._draw(own, model, first=first, **asked)
        mine = slice(ranks.local_rank() * len(prompts), (ranks.local_rank() + 1) * len(prompts))
        return tuple(part[mine] for part in ranks.everybody(drawn)[leader])

    def _draw(self, prompts, model, *, first: int, **asked):
        answers(self.starting)
        self.starting = []
        self.bring(model)
        share = ceil(len(prompts) / len(self.engines))
        shares = [(start, prompts[start : start + share]) for start in range(0, len(prompts), share)]
        at_work = self.engines[: len(shares)]  # few prompts may leave one without any
        for engine, (start, some) in zip(at_work, shares, strict=True):
            engine.ask("generate", some, first=first + start, **asked)
        return tuple(list(chain.from_iterable(parts)) for parts in zip(*answers(at_work), strict=True))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def engines_apart(p: Rollouts, base: Path, adapter: Path, *, gpus: Sequence[str], strict: bool, precision: Precision, completions: int,
                  folder: Path, **settings) -> RolloutsApart:  # fmt: skip
    """Starts vLLM on each of these GPUs. completions: that a trainer asks for in a step; folder: where the first trainer of the machine puts the
    adapter, and all engines read it; see VllmRollouts for the others.
    """
    requests = ceil(completions * ranks.local_size() / len(gpus))
    make = partial(Engine, p, base, adapter, strict=strict, precision=precision, requests=requests, folder=folder, **settings)
    bring = partial(write_trained, dtype=DTYPES[precision]) if p.merged else write_adapter
    return RolloutsApart(make, gpus, partial(bring, folder=folder))


class Engine:
    """vLLM in a process of its own, and the base where it adds the adapter to it."""

    def __init__(self, p: Rollouts, base: Path, adapter: Path, *, strict: bool, precision: Precision, **settings) -> None:
        set_up_vllm(batch_invariant=not p.merged)
        use_strict_kernels(strict)
        use_portable_arithmetic()
        self.model = None
        if p.merged:
            backend = Transformers(precision)
            self.model = backend.held_adapter(backend.load_base(base), adapter)
        self.rollouts = VllmRollouts(p, base, precision=precision, **settings)
        if p.merged:
            self.rollouts.merge_into(self.model)

    def ready(self) -> None:
        """To be made is all that is asked."""

    def generate(self, prompts, **asked):
        if self.model is not None:
            read_trained(self.model, self.rollouts.adapter)
        return self.rollouts.generate(prompts, self.model, **asked)


def write_trained(model, folder: Path, dtype: str) -> None:
    """The weights in training, rounded as they will be when they are multiplied: half of what 32 bits take."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: weight.detach().to(getattr(torch, dtype)) for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(trained, folder / TRAINED)


def read_trained(model, folder: Path) -> None:
    """Brings them into a model of the same names."""
    from safetensors.torch import load_file

    found = model.load_state_dict(load_file(folder / TRAINED), strict=False)
    if found.unexpected_keys:
        raise RuntimeError(f"the trainer has weights that the engine's model has not: {found.unexpected_keys[0]}")


class _Asked(BaseModel):
    """What of grpo's section decides how much memory its engine and its trainer take; the stage itself is strict about all of it."""

    backend: str
    optimizer: str
    precision: Precision
    per_device_batch: int
    accumulation: int
    max_prompt: int
    max_completion: int
    nf4: bool
    rollouts: Rollouts


def planned_gpus(values: dict[str, Any], base: Path, adapter: Path, gpus: int, memory_gib: float) -> int:
    """How many of so many GPUs, of so much memory, the engines get alone: none where an engine fits beside a trainer.

    Else the fewest that leave as many trainers as divide the batch. values: grpo's section of params.yaml.
    """
    try:
        p = _Asked.model_validate(values)
    except ValidationError:
        return 0  # the stage says what is wrong
    if gpus < 2 or p.rollouts.engine != "vllm":
        return 0
    beside = engine_bytes(Shape.read(base), p.rollouts, lends=p.backend == "transformers" and not p.nf4)
    rank = read_json(adapter / "adapter_config.json")["r"]
    if needs_of(p, base, rank, p.max_prompt + p.max_completion, p.nf4, beside).fits(memory_gib):
        return 0
    return next(count for count in range(1, gpus) if p.per_device_batch * p.accumulation % (gpus - count) == 0)


def engine_bytes(shape: Shape, p: Rollouts, *, lends: bool) -> float:
    """What an engine takes beside a trainer: keys and values, and its weights where they are not the trainer's too."""
    own = (shape.linear + shape.embedding) * 2 if p.merged or not lends else 0
    return p.kv_cache_gib * GIB + own
