"""What a model's tokenizer files say by themselves: its marks, and how it splits text before it looks tokens up.

Read from tokenizer.json and tokenizer_config.json alone, so that stages without torch or transformers can ask.
"""

import shutil
from pathlib import Path
from typing import Any

from stages.corpus.marks import TEXT_END, TURN_ENDS, Marks
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json

SENTENCEPIECE = "tokenizer.model"  # a SentencePiece tokenizer as llama.cpp's converter reads it; transformers leaves it behind
# Qwen2's pre-tokenizer: words, single digits, punctuation, line ends (Qwen/Qwen1.5-4B, tokenizer.json).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")  # up to three digits at once
PRE_TOKENIZERS = {QWEN2_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe"}  # by the names that llama.cpp has for them


def marks_of(folder: Path, called: str = "") -> Marks:
    """The marks of the model in a folder; InputError, which may call it otherwise, where it has no token to end an answer with.

    A turn ends with a family's own token where the vocabulary has one, a text with `<|endoftext|>`; else both with eos.
    """
    about, config = _tokenizer(folder, called), {}
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
    known = [token["content"] for token in about.get("added_tokens", ())]
    eos = _text(config.get("eos_token"))
    text_end = TEXT_END if TEXT_END in known else eos
    turn_end = next((token for token in TURN_ENDS if token in known), eos)
    for token in (turn_end, text_end):
        if token not in known:
            named = f"{token}, which is no special token," if token else "nothing"
            raise InputError(f"{called or folder}: its tokenizer names {named} as eos_token, with which answers would end: "
                             "name another model in params.yaml's base_model")  # fmt: skip
    return Marks(turn_end, text_end, _begin(about, config))


def pre_tokenizer_pattern(about: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer that splits by one pattern and then reads bytes, as Qwen's and Llama's do.

    `about` is what tokenizer.json holds.
    """
    match (about.get("pre_tokenizer") or {}).get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            return pattern
    return None


def pre_tokenizer_name(folder: Path) -> str | None:
    """The name by which llama.cpp knows how this folder's tokenizer splits text; None for a way that is not known here."""
    return PRE_TOKENIZERS.get(pre_tokenizer_pattern(_tokenizer(folder)))


def token_text(folder: Path, id: int) -> str:
    """The text of an added token; "" where the id is none's."""
    return next((token["content"] for token in _tokenizer(folder).get("added_tokens", ()) if token["id"] == id), "")


def keep_sentencepiece(base: Path, out: Path) -> None:
    """Carries a base's SentencePiece file on into a folder made of it, where it has one."""
    if (base / SENTENCEPIECE).is_file():
        shutil.copyfile(base / SENTENCEPIECE, out / SENTENCEPIECE)


def _begin(about: dict[str, Any], config: dict[str, Any]) -> str:
    """The token that the tokenizer itself puts before a text: tokenizer_config.json's word counts before tokenizer.json's."""
    adds, bos = config.get("add_bos_token"), _text(config.get("bos_token"))
    if isinstance(adds, bool):
        return bos if adds else ""
    post = about.get("post_processor") or {}
    for processor in post.get("processors", [post]):
        match processor:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": first}}, *_]}:
                return first
    return ""


def _text(token: str | dict[str, Any] | None) -> str:
    """A token as tokenizer_config.json names it: by its text, or with how it is matched."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _tokenizer(folder: Path, called: str = "") -> dict[str, Any]:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{called or folder} has no tokenizer.json: name a base that has one, as transformers' save_pretrained writes it")
    return read_json(folder / "tokenizer.json")
