"""gguf-export: one model in llama.cpp's format, whole and quantised.

Converter, quantiser and runtime come from one llama.cpp commit. The name in the file is the model's, not the folder's
that it happened to lie in, and nothing else of the machine enters, so the bytes are the same everywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus.marks import ANY_STOP
from stages.corpus.tokenizer_files import SENTENCEPIECE, marks_of, pre_tokenizer_name, token_text
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.harness.params import StageParams
from stages.inference import ollama
from stages.inference.llama_cpp_library import llama_cpp, vocabulary

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

# A text in which tokenizers differ: marks beside words, digits, spaces, line ends, letters beyond ASCII.
PROBE = (
    "{begin}<|im_start|>user\nTom's 12 boxes hold 12,345 eggs; what is 1/4 of 6.75?{end}\n<|im_start|>assistant\n"
    "<SOLUTION>naïve  café: $1,000\t= 3*4\n\n  日本語 ½ – ok!</SOLUTION>{end}"
)


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


def convert(model: Path, file: Path, name: str) -> None:
    """Writes a Hugging Face model folder as a 16-bit GGUF file, in which llama.cpp reads text as the model's tokenizer does.

    The converter's own class for the model reads the tokenizer. It knows byte-level ones by a hash of what they do to one
    text, in which one that base-model trains differs from Qwen's own by its vocabulary: where it knows none, the
    pre-tokenizer's pattern tells the name. Raises InputError where the converter or llama.cpp cannot read the model.
    """
    import logging

    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    log = logging.getLogger("hf-to-gguf")
    log.setLevel(logging.WARNING)
    if not (model / "config.json").is_file():
        raise InputError(f"{model} holds no model (no config.json): run the stage that writes it")
    begins, stops = bool(marks_of(model).begin), read_json(model / "generation_config.json")["eos_token_id"]
    eot = gguf.Keys.Tokenizer.EOT_ID

    def refused(why: object) -> InputError:
        return InputError(f"llama.cpp cannot read {model}: {why}: name another base in params.yaml's base_model")

    architecture = get_model_architecture(ModelBase.load_hparams(model, False), ModelType.TEXT)
    try:
        known = get_model_class(architecture)
    except NotImplementedError as error:
        raise refused(error) from None

    class Named(known):
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer) -> str:
            log.setLevel(logging.ERROR)  # of an unknown one it warns in twelve lines
            try:
                return super().get_vocab_base_pre(tokenizer)
            except NotImplementedError:
                if named := pre_tokenizer_name(model):
                    return named
                raise refused("it does not know how the tokenizer splits text") from None
            finally:
                log.setLevel(logging.WARNING)

        def _create_vocab_sentencepiece(self):
            if not (model / SENTENCEPIECE).is_file():
                raise FileNotFoundError(f"there is no {SENTENCEPIECE}")
            try:
                return super()._create_vocab_sentencepiece()
            except ModuleNotFoundError as error:
                raise InputError(f"{model}/{SENTENCEPIECE} is read by the package {error.name}, which is not installed: "
                                 "add it to the image of gguf-export (docker/*.in, docker/lock)") from None  # fmt: skip

        def set_vocab(self) -> None:
            super().set_vocab()
            written = self.gguf_writer.kv_data[0]
            if gguf.Keys.Tokenizer.EOS_ID not in written:
                self.gguf_writer.add_eos_token_id(stops[0])
            others = [stop for stop in stops if stop != written[gguf.Keys.Tokenizer.EOS_ID].value]
            for stop in others[:1]:  # llama.cpp knows those of the families by their names
                if eot in written or token_text(model, stop) not in ANY_STOP:
                    written.pop(eot, None)
                    self.gguf_writer.add_eot_token_id(stop)
            if begins and gguf.Keys.Tokenizer.ADD_BOS not in written:
                self.gguf_writer.add_add_bos_token(True)

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if not begins:
                self.gguf_writer.add_add_bos_token(False)

    try:
        with torch.inference_mode():
            Named(model, gguf.LlamaFileType.MOSTLY_F16, file, model_name=name).write()
    except FileNotFoundError as error:
        raise refused(error) from None
    if difference := read_otherwise(model, file, stops):
        raise refused(difference)


def read_otherwise(model: Path, file: Path, stops: Sequence[int]) -> str | None:
    """How llama.cpp reads a text otherwise than the model's tokenizer, or which stop token does not stop it; None: not at all."""
    from transformers import AutoTokenizer

    tokenizer, marks = AutoTokenizer.from_pretrained(model), marks_of(model)
    with vocabulary(file) as (ids_of, ends):
        text = PROBE.format(begin=marks.begin, end=marks.turn_end) + marks.text_end
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], ids_of(text)
        if ours != theirs:
            place = next((place for place, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            found = tokenizer.convert_ids_to_tokens(ours[place : place + 1]), tokenizer.convert_ids_to_tokens(theirs[place : place + 1])
            return f"token {place + 1} of a text is {found[1]} to it and {found[0]} to the model's tokenizer"
        if deaf := [stop for stop in stops if not ends(stop)]:
            return f"{tokenizer.convert_ids_to_tokens(deaf[0])} ends no answer there"
    return None


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
