"""The models that the graph has made here: their names, their files, and how each wants to be asked."""

from dataclasses import dataclass
from pathlib import Path

from stages.corpus.chat_format import STOP_TEXTS, render
from stages.corpus.marks import Marks
from stages.corpus.tokenizer_files import marks_of
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json

BASE = Path("models/base")
MODELS = ("base", "sft", "qlora", "grpo", "orpo")
ENGINES = ("llama_cpp", "transformers", "vllm")
FORMS = ("q4_k_m", "q8_0", "f16")  # where none is named, the first that is here is taken


@dataclass(frozen=True)
class Prompt:
    """The way of asking a model that it was trained with and that eval scored it in."""

    template: str
    stop_text: str | None  # what ends an answer beside the stop tokens

    def ask(self, question: str) -> str:
        """The whole prompt for one question, up to where the answer begins."""
        return render(self.template, question)


def prompt_of(folder: Path, model: str, own: str | None) -> Prompt:
    """A model's own template as its prompt; where it carries none, as the base, the way that eval found best for it."""
    if own:
        return Prompt(own, None)
    metrics = folder / f"results/metrics/{model}.json"
    if not metrics.is_file():
        raise InputError(f"results/metrics/{model}.json, which says how {model} is asked best, is missing: run `dvc repro eval@{model}`")
    name = read_json(metrics)["prompt"]
    template = folder / f"data/mix/prompts/{name}.jinja"
    if not template.is_file():
        raise InputError(f"data/mix/prompts/{name}.jinja, by which {model} is asked, is missing: "
                         "run `dvc repro prepare-mix`, or bring it with `dvc pull prepare-mix`")  # fmt: skip
    return Prompt(template.read_text(encoding="utf-8"), STOP_TEXTS.get(name))


def base_marks(folder: Path) -> Marks:
    """The marks of the base, Qwen's where it is not here."""
    return marks_of(folder / BASE) if (folder / BASE / "tokenizer.json").is_file() else Marks()


def template_in(weights: Path) -> str | None:
    """The chat template that a folder of weights carries, in a file of its own or, as older ones, among its tokenizer's settings."""
    own, settings = weights / "chat_template.jinja", weights / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return read_json(settings).get("chat_template") if settings.is_file() else None


def forms_here(folder: Path, model: str) -> list[str]:
    """The GGUF forms of a model that are here."""
    return sorted(file.stem for file in (folder / "models/gguf" / model).glob("*.gguf"))


def models_here(folder: Path) -> list[str]:
    """The models that are here in any GGUF form, or whole."""
    return [model for model in MODELS if forms_here(folder, model) or (folder / whole_weights(model)).is_dir()]


def gguf_of(folder: Path, model: str, form: str | None) -> Path:
    """A model's GGUF file in a form, or in the smallest that is here."""
    here = forms_here(folder, model)
    if not here:
        raise InputError(f"{model} has no GGUF file in models/gguf/{model}: run `dvc repro gguf-export@{model}`, "
                         f"or bring it with `dvc pull gguf-export@{model}`")  # fmt: skip
    if form is not None and form not in here:
        raise InputError(f"models/gguf/{model} has no {form}.gguf: name one of {', '.join(here)}, or add the form to "
                         "gguf_export.files in params.yaml")  # fmt: skip
    form = form or min(here, key=[*FORMS, *here].index)
    return folder / f"models/gguf/{model}/{form}.gguf"


def weights_of(folder: Path, model: str) -> Path:
    """The folder of a model's whole weights."""
    whole = whole_weights(model)
    if not (folder / whole / "config.json").is_file():
        stage = "base-model" if model == "base" else f"merge@{model}"
        raise InputError(f"{whole} holds no model: run `dvc repro {stage}`, or bring it with `dvc pull {stage}`")
    return folder / whole


def whole_weights(model: str) -> Path:
    """Where the graph puts a model's whole weights."""
    return BASE if model == "base" else Path("models/merged") / model
