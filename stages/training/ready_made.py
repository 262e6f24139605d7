"""A base model that others made, from a hub or a folder: its weights as they are, its tokenizer held to what the methods rely on."""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.corpus import hub
from stages.corpus.marks import Marks
from stages.corpus.sources_lock import CONFIGS, MODEL_FILES, Snapshot, is_weights, refuse_no_weights, refuse_own_code
from stages.corpus.tokenizer_files import keep_sentencepiece, marks_of
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.training.own_tokenizer import PAD

# Tokens that a family keeps for padding or for nothing: what stands there ends no answer. The unknown token comes last.
UNUSED = (r"<\|finetune_right_pad_id\|>", "<pad>", r"\[PAD\]", r"<\|reserved_special_token_\d+\|>", r"<unused\d+>", "<unk>")


def take_published(source: Snapshot, half: Path, out: Path) -> None:
    """Takes the base from the hub; `half` is where the files of a killed run lie. Raises what `take` raises."""
    hub.download(source, half)
    take(str(source.repository), half, source.files, hub.keep, out)
    write_json(out / "source.json", {"repo": source.repository.id, "revision": source.commit, **source.pinned.terms})


def take_local(name: str, sha256: str | None, local_files: Path, out: Path) -> None:
    """Takes the base from a folder that the user keeps, after a check that its files are those of `sha256`.

    Raises InputError where the folder is missing, its hash another or none, and what `take` raises.
    """
    folder, told = local_files / name, f"model {name}"
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: put the model's folder there (run.local_files says where)")
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    refuse_no_weights(told, names)
    files = [name for name in names if name.endswith(MODEL_FILES)]
    if (found := folder_sha256(folder, files)) != sha256:
        wants = "names none" if sha256 is None else f"wants {sha256}"
        raise InputError(f"{folder} has sha256 {found}, params.yaml's base_model.sha256 {wants}: "
                         "get the right files, or write that there")  # fmt: skip
    take(told, folder, files, shutil.copyfile, out)
    write_json(out / "source.json", {"kind": "local", "folder": name, "sha256": found})


def folder_sha256(folder: Path, names: Sequence[str]) -> str:
    """One hash of some files of a folder: that of the lines which `sha256sum` prints for them, sorted by name."""
    lines = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            lines.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return lines.hexdigest()


def take(model: str, folder: Path, names: Sequence[str], place: Callable[[Path, Path], object], out: Path) -> None:
    """Writes the folder of a model that others made: config and weights untouched, its tokenizer without template and with padding.

    `model` is how messages call it, `place` copies or links a file. Raises InputError where the model needs code of its own or
    its tokenizer lacks what the methods rely on.
    """
    for name in set(names) & set(CONFIGS):
        refuse_own_code(model, name, read_json(folder / name))

    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise InputError(f"{model} is not a model that transformers reads ({str(error).splitlines()[0]}): "
                         "name another in params.yaml's base_model") from None  # fmt: skip
    tokenizer.chat_template = None
    tokenizer.init_kwargs.pop("chat_template", None)  # or the files would name one, null
    with TemporaryDirectory() as saved:  # its files say what its class adds
        tokenizer.save_pretrained(saved)
        marks = marks_of(Path(saved), model)
    rows, stop_ids = config.get_text_config().vocab_size, tokenizer.convert_tokens_to_ids(list(marks.stops))
    if without := [token for token, id in zip(marks.stops, stop_ids) if id >= rows]:
        raise InputError(f"{model} has no weights for {without[0]}, with which answers would end: "
                         "name another model in params.yaml's base_model")  # fmt: skip
    _see_to_padding(tokenizer, model, marks, rows)
    _see_to_beginning(tokenizer, model, marks)
    tokenizer.save_pretrained(out)
    for name in names:
        if name == "config.json" or is_weights(name):
            place(folder / name, out / name)
    keep_sentencepiece(folder, out)
    GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)


def _see_to_padding(tokenizer, model: str, marks: Marks, vocab: int) -> None:
    """Gives the tokenizer a padding token that neither ends nor begins anything.

    Qwen pads with <|endoftext|>, which is learnt as an answer's end only where it is not taken for padding. Its
    embedding has rows to spare (Qwen1.5-4B: 151,936 for 151,646 tokens), so that a token more needs no new weights; a
    model without such rows pads with a token that it has no use for.
    """
    known, taken = tokenizer.get_vocab(), {tokenizer.eos_token, tokenizer.bos_token, marks.begin, *marks.stops}
    if tokenizer.pad_token not in (None, *taken) and known[tokenizer.pad_token] < vocab:
        return
    pad = PAD
    if PAD not in known and len(tokenizer) >= vocab:
        unused = [token for form in UNUSED for token in sorted(known) if re.fullmatch(form, token)]
        pad = next((token for token in unused if known[token] < vocab and token not in taken), None)
    if pad is None:
        raise InputError(f"{model} has no token to pad with and none of its {vocab} rows to spare for one: "
                         "name another model in params.yaml's base_model")  # fmt: skip
    tokenizer.add_special_tokens({"pad_token": pad})


def _see_to_beginning(tokenizer, model: str, marks: Marks) -> None:
    """Holds the marks to what the tokenizer does; a bos token that begins no text is none, or a trainer would add it."""
    added, bare = (tokenizer("1", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    begin = tokenizer.convert_tokens_to_ids([marks.begin]) if marks.begin else []
    if added != [*begin, *bare]:
        raise InputError(f"{model}: its tokenizer adds {tokenizer.convert_ids_to_tokens(added)} around a text, and only one token "
                         "before it is known here: name another model in params.yaml's base_model")  # fmt: skip
    if not begin and tokenizer.bos_token is not None:
        tokenizer.bos_token = None
