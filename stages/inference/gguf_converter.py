"""llama.cpp's own converter, told what it does not know of a model's tokenizer, and its work checked by llama.cpp itself."""

from collections.abc import Sequence
from pathlib import Path

from stages.corpus.marks import ANY_STOP
from stages.corpus.tokenizer_files import SENTENCEPIECE, marks_of, pre_tokenizer_name, token_text
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.inference.llama_cpp_library import vocabulary

# A text in which tokenizers differ: marks beside words, digits, spaces, line ends, letters beyond ASCII.
PROBE = (
    "{begin}<|im_start|>user\nTom's 12 boxes hold 12,345 eggs; what is 1/4 of 6.75?{end}\n<|im_start|>assistant\n"
    "<SOLUTION>naïve  café: $1,000\t= 3*4\n\n  日本語 ½ – ok!</SOLUTION>{end}"
)


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
