"""How a model lies in its repository on the hub: what transformers, vLLM, llama.cpp and Ollama each look for, in one place.

Weights lie at the root, where every loader begins: merged ones, for the adapter lies in a folder of its own, as transformers
takes a root with adapter_config.json for an adapter. A base that was made here is on no hub: it goes beside its adapter.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.corpus.chat_format import STOP_TEXTS
from stages.corpus.marks import Marks
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.host.models import BASE, whole_weights
from stages.inference import ollama

CARD = "README.md"
OLLAMA = (ollama.MODELFILE, "template", "params")  # the last two are what `ollama run hf.co/...` reads
NOT_WEIGHTS = ("source.json", "tensors.json")  # of our folders, for our own stages
# Every name that a publication may have written.
OURS = re.compile(r"(adapter|base)/.+|[^/]+\.(gguf|safetensors|safetensors\.index\.json|jinja)|"
                  rf"(config|generation_config|tokenizer|tokenizer_config)\.json|tokenizer\.model|{'|'.join(OLLAMA)}|{CARD}")  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """What of a model is published. `weights` are those at the root: merged ones, or the base's own."""

    adapter: bool
    weights: bool
    gguf: tuple[str, ...]  # forms


@dataclass(frozen=True)
class Part:
    """One file: its name in the repository, and where its bytes are, or they themselves where they are made for it."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def choose(model: str, params: dict[str, Any], adapter: bool, merged: bool, gguf: tuple[str, ...]) -> Chosen:
    """What is asked for, or everything where nothing is. Raises InputError for what there is not."""
    made = tuple(params["gguf_export"]["files"])
    if model == "base" and (adapter or merged):
        raise InputError("base has no adapter, and so nothing merged: leave --adapter and --merged out, its own weights are published")
    if missing := [form for form in gguf if form not in made]:
        raise InputError(f"--gguf {missing[0]}: params.yaml's gguf_export.files makes {', '.join(made)}: name one of them")
    if not (adapter or merged or gguf):
        return Chosen(adapter=model != "base", weights=True, gguf=made)
    return Chosen(adapter=adapter, weights=merged, gguf=tuple(dict.fromkeys(gguf)))


def folders(model: str, chosen: Chosen, base_is_here: bool) -> list[Path]:
    """The outs that the chosen parts are taken from; `base_is_here` where the base is on no hub."""
    return [
        *([whole_weights(model)] if chosen.weights else []),
        *([Path("models") / model] if chosen.adapter else []),
        *([BASE] if chosen.adapter and base_is_here else []),
        *([Path("models/gguf") / model] if chosen.gguf else []),
    ]


def parts(tree: Path, model: str, to: str, chosen: Chosen, base_source: dict[str, Any] | None, asked: "Asking") -> Iterator[Part]:
    """The files in the repository `to`, but for the card; folders that are not here are passed over."""
    if chosen.weights:
        yield from _folder(tree / whole_weights(model))
    if chosen.adapter:
        for part in _folder(tree / "models" / model, "adapter/"):
            yield Part(part.name, _naming_its_base(part, to, base_source)) if part.name == "adapter/adapter_config.json" else part
        if base_source is None:
            yield from _folder(tree / BASE, "base/")
    for form in chosen.gguf:
        if (file := tree / "models/gguf" / model / f"{form}.gguf").is_file():
            yield Part(gguf_name(to, form), file)
    if chosen.gguf:
        yield from asked.parts(gguf_name(to, asked.preferred(chosen.gguf)))


def gguf_name(to: str, form: str) -> str:
    """A GGUF file's name: llama.cpp and Ollama find a form by its name in capitals after the last hyphen."""
    return f"{to.rpartition('/')[2]}-{form.upper()}.gguf"


@dataclass(frozen=True)
class Asking:
    """How a model is asked, for runtimes that do not read its own template."""

    prompt: str  # its name in comparison.json: own, or a base's best
    template: str  # Jinja
    scored: str  # the GGUF form whose score stands in metrics.json
    marks: Marks = Marks()  # of the base

    def preferred(self, forms: tuple[str, ...]) -> str:
        """The form that is run where none is named."""
        return self.scored if self.scored in forms else forms[0]

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [*self.marks.stops, *([STOP_TEXTS[self.prompt]] if self.prompt in STOP_TEXTS else [])]

    def parts(self, gguf: str) -> Iterator[Part]:
        """What Ollama reads: a Modelfile, and for a model that it brings from the hub by itself, template and params."""
        template = ollama.go_template(self.template, self.marks.begin)
        texts = ollama.modelfile(gguf, template, self.stops), template, ollama.params(self.stops)
        for name, text in zip(OLLAMA, texts, strict=True):
            yield Part(name, text.encode())


def _folder(folder: Path, below: str = "") -> Iterator[Part]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in NOT_WEIGHTS:
            yield Part(f"{below}{file.relative_to(folder).as_posix()}", file)


def _naming_its_base(config: Part, to: str, base_source: dict[str, Any] | None) -> bytes:
    """An adapter's configuration as others can use it: here the base is a path.

    A base that was made here lies in a folder, which peft's automatic loading cannot name; so that it takes no other model
    for it, the name that stands there is none of a repository.
    """
    base, revision = (base_source["repo"], base_source["revision"]) if base_source else (f"{to}/base", None)
    named = {"base_model_name_or_path": base, "revision": revision}
    return (json.dumps(read_json(config.content) | named, indent=2, sort_keys=True) + "\n").encode()
