"""One engine on each of several GPUs, in processes of their own, that answer as one alone would."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.harness import measures
from stages.harness.apart import Apart, answers
from stages.inference.engine import Completion, Engine, Sampling, in_order
from stages.inference.transformers_engine import TransformersEngine
from stages.inference.vllm_engine import Vllm, VllmEngine


def start_engine(name: str, folder: Path, batch_size: int, vllm: Vllm, workers: int = 1) -> Engine:
    """The engine `transformers` or `vllm` on a model folder: in this process, or one on each of the several GPUs that it is to see."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    make, more = (VllmEngine, vllm) if name == "vllm" else (TransformersEngine.from_folder, workers if len(gpus) == 1 else 1)
    return make(folder, batch_size, more) if len(gpus) == 1 else Spread(make, folder, batch_size, more, gpus=gpus)


class Spread:
    """An Engine of several, each what `make(*arguments)` returns, started all at once; they end with this process.

    Each is told all prompts and answers its part of them, which it deals to itself so that answers are those of one engine.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, gpus: Sequence[str]) -> None:
        """Waits until all have started. Raises what the first to fail does, as all methods do: InputError, else RuntimeError."""
        self.engines = [Apart(make, *arguments, gpu=gpu, name=f"engine on GPU {gpu}") for gpu in gpus]
        for engine in self.engines:
            engine.ask("__getattribute__", "template")
        self.template = answers(self.engines)[0]
        measures.note(engines=len(gpus))

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See Engine."""
        for part, engine in enumerate(self.engines):
            engine.ask("part_of", prompts, sampling, part, len(self.engines))
        return in_order(answers(self.engines))

    def mean_log_probabilities(self, asked: Sequence[tuple[str, str]]) -> list[float]:
        """See the engines' own."""
        for part, engine in enumerate(self.engines):
            engine.ask("mean_log_probabilities", asked[part :: len(self.engines)])
        found = [0.0] * len(asked)
        for part, of_part in enumerate(answers(self.engines)):
            found[part :: len(self.engines)] = of_part
        return found

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
