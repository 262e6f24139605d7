"""How many tokens a text takes, counted with tiktoken where a model's tokenizer can be read as one of its kind.

tiktoken counts eight times as fast as the tokenizers library and gives the same tokens; a text whose count is close to the
limit is counted by the model's own tokenizer all the same.
"""

import json
import unicodedata
from pathlib import Path

from stages.corpus.tokenizer_files import pre_tokenizer_pattern

CHARACTERS = 5  # a token's, more than most have: a text's start of so many times the limit shows that it is too long
CLOSE = 16  # tokens to either side of a limit within which the tokenizer itself decides


class Lengths:
    """Counts tokens of rendered texts as training will see them: special tokens are written out and count one each."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds a model's tokenizer.json."""
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(file))
        about = json.loads(file.read_text(encoding="utf-8"))
        self.composes = about.get("normalizer") is not None
        self.quick = _as_tiktoken(about)

    def count(self, text: str) -> int:
        """A text's tokens, counted by the tokenizer itself."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def over(self, text: str, most: int) -> bool:
        """Whether a text takes more than `most` tokens."""
        if self.quick:
            count = len(self._first_tokens(text, most))
            if abs(count - most) > CLOSE:
                return count > most
        return self.count(text) > most

    def cut(self, text: str, most: int, kept: int) -> str | None:
        """None where a text takes at most `most` tokens; else its start that the first `kept` spell, in whole characters."""
        if not self.quick:
            ends = [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]
            return text[: ends[kept - 1]] if len(ends) > most else None
        tokens = self._first_tokens(text, most)
        if len(tokens) > most + CLOSE or len(tokens) >= most - CLOSE and self.over(text, most):
            return self.quick.decode_bytes(tokens[:kept]).decode(errors="ignore")
        return None

    def _first_tokens(self, text: str, most: int) -> list[int]:
        """A text's tokens: all, or clearly more than `most`."""
        text = self._composed(text)
        start = text[: most * CHARACTERS]
        tokens = self.quick.encode(start, allowed_special="all")
        return (
            tokens
            if len(tokens) > most + CLOSE or len(start) == len(text)
            else self.quick.encode(text, allowed_special="all")
        )

    def _composed(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.composes and not text.isascii() else text


def _as_tiktoken(about: dict):
    """The tiktoken form of a byte-level BPE whose merges stand in the order of the tokens they make; None for others."""
    model, pattern = about["model"], pre_tokenizer_pattern(about)
    tokens = model.get("vocab")
    if model["type"] != "BPE" or pattern is None or about.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    made = [tokens["".join(pair)] for pair in pairs]
    if made != sorted(made) or model.get("ignore_merges"):
        return None
    from tiktoken import Encoding

    bytes_of = _bytes_of_letters()
    special = {token["content"]: token["id"] for token in about["added_tokens"]}
    ranks = {bytes(map(bytes_of.get, token)): rank for token, rank in tokens.items() if token not in special}
    return Encoding("the model's own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible letter (GPT-2's `bytes_to_unicode`); this reads them back."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}
