"""gguf-export: one model in llama.cpp's format, whole and quantised.

Converter, quantiser and runtime come from one llama.cpp commit. The name in the file is the model's, not the folder's
that it happened to lie in, and nothing else of the machine enters, so the bytes are the same everywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json
from stages.harness.params import StageParams
from stages.inference import ollama
from stages.inference.llama_cpp_library import llama_cpp

QUANTISED = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
README = """\
# How to run these files

By llama.cpp's server, from this folder, one of

{lines}

by Ollama (its Modelfile takes {form}.gguf; another form is another name in its first line)

    ollama create mathmind -f Modelfile
    ollama run mathmind

{asked}
"""
HOW_ASKED = "The files carry the template that the model was trained with; the Modelfile says the same in Ollama's own words."
HOW_A_BASE_IS_ASKED = (
    "A base model was taught no form of question, and its files carry no template: give it the whole text that it is to go on with."
)
K_QUANT_ROW = 256  # K-quants hold rows in blocks of so many weights; other rows fall back to a plainer type


class Params(StageParams):
    """`files` names what is made beside f16."""

    name: str  # general.name in the files: the name of the family of models
    files: tuple[Literal["f16", "q8_0", "q4_k_m"], ...] = Field(strict=False)


def run(p: Params, *, model: Path, out: Path) -> None:
    """Writes out/<form>.gguf of each form in `files`, out/tensors.json (how many tensors each holds in what type), and how to run them.

    That is out/Modelfile, with which Ollama asks the last form of `files` as the model was taught, and out/README.md.
    """
    out.mkdir(parents=True)
    whole = out / "f16.gguf"
    convert(model, whole, p.name)
    for form in p.files:
        if form != "f16":
            quantise(whole, out / f"{form}.gguf", form)
    if "f16" not in p.files:
        whole.unlink()
    counts = {form: tensor_types(out / f"{form}.gguf") for form in p.files}
    write_json(out / "tensors.json", counts)
    _say_how_to_run(model, p.files, out)
    if fallen := fallen_back(counts.get("q4_k_m", {})):
        measures.note(q4_k_m_fallback_tensors=fallen)
        print(f"gguf-export: {fallen} of {sum(counts['q4_k_m'].values())} tensors of {model} fell back from q4_k_m: "
              f"their rows are no multiple of {K_QUANT_ROW}")  # fmt: skip


def _say_how_to_run(model: Path, forms: Sequence[str], out: Path) -> None:
    """Writes Modelfile and README.md beside the files."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    stops = tokenizer.convert_ids_to_tokens(GenerationConfig.from_pretrained(model).eos_token_id)
    modelfile = ollama.modelfile(f"{forms[-1]}.gguf", tokenizer.chat_template, stops)
    (out / ollama.MODELFILE).write_text(modelfile, encoding="utf-8")
    jinja = " --jinja" if tokenizer.chat_template else ""
    lines = "\n".join(f"    llama-server -m {form}.gguf{jinja} --temp 0" for form in forms)
    asked = HOW_ASKED if tokenizer.chat_template else HOW_A_BASE_IS_ASKED
    (out / "README.md").write_text(README.format(lines=lines, form=forms[-1], asked=asked), encoding="utf-8")


def convert(model: Path, file: Path, name: str) -> None:
    """Writes a Hugging Face model folder as a 16-bit GGUF file.

    The tokenizer that base-model trains has Qwen2's pre-tokenizer; llama.cpp knows tokenizers by a hash of what they do
    to one text, in which ours differs from Qwen's own by its vocabulary, so the name is given instead of looked up.
    """
    import logging

    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.getLogger("hf-to-gguf").setLevel(logging.WARNING)
    if not (model / "config.json").is_file():
        raise InputError(f"{model} holds no model (no config.json): run the stage that writes it")
    architecture = get_model_architecture(ModelBase.load_hparams(model, False), ModelType.TEXT)
    known = get_model_class(architecture)

    class Named(known):
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer) -> str:
            return "qwen2"

        def set_vocab(self) -> None:
            self._set_vocab_gpt2()

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            self.gguf_writer.add_add_bos_token(False)

    with torch.inference_mode():
        Named(model, gguf.LlamaFileType.MOSTLY_F16, file, model_name=name).write()


def quantise(whole: Path, file: Path, form: str) -> None:
    """Writes a quantised form of a 16-bit GGUF file."""
    api = llama_cpp()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, QUANTISED[form])
    params.nthread = 1
    if api.llama_model_quantize(str(whole).encode(), str(file).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantise {whole} to {form}")


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors a GGUF file holds in each type."""
    import gguf

    types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors]
    return {name: types.count(name) for name in sorted(set(types))}


def fallen_back(types: dict[str, int]) -> int:
    """How many tensors of a q4_k_m file are in a type that is neither a K-quant nor kept whole on purpose."""
    return sum(count for name, count in types.items() if not name.endswith("_K") and name not in ("F32", "F16"))
