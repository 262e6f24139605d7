"""gguf-export: one model in llama.cpp's format, whole and quantised.

Converter, quantiser and runtime come from one llama.cpp commit. The name in the file is the model's, not the folder's
that it happened to lie in, and nothing else of the machine enters, so the bytes are the same everywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus.tokenizer_files import marks_of
from stages.harness import measures
from stages.harness.jsonl import write_json
from stages.harness.params import StageParams
from stages.inference import ollama
from stages.inference.gguf_converter import convert
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
    marks, own = marks_of(model), model / "chat_template.jinja"
    template = ollama.go_template(own.read_text(encoding="utf-8") if own.is_file() else "", marks.begin)
    (out / ollama.MODELFILE).write_text(ollama.modelfile(f"{forms[-1]}.gguf", template, marks.stops), encoding="utf-8")
    jinja, asked = (" --jinja", HOW_ASKED) if own.is_file() else ("", HOW_A_BASE_IS_ASKED)
    lines = "\n".join(f"    llama-server -m {form}.gguf{jinja} --temp 0" for form in forms)
    (out / "README.md").write_text(README.format(lines=lines, form=forms[-1], asked=asked), encoding="utf-8")


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
