"""What every inference engine offers: prompts in, completions out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Completion:
    """A model's answer, without its stop token; `tokens` counts what was generated, the stop token included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How to generate; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Engine(Protocol):
    """A loaded model that stops at either of its stop tokens."""

    template: str | None  # the chat template that the model carries; a base model has none

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt (whole rendered texts), in their order."""
        ...


def in_order(parts: Iterable[Mapping[int, Found]]) -> list[Found]:
    """What several engines, or one, found of all places from 0."""
    found = {place: each for part in parts for place, each in part.items()}
    return [found[place] for place in range(len(found))]
