"""The tokenizer of a model that is pretrained here."""

from collections.abc import Sequence

from stages.corpus.marks import TEXT_END, TURN_END, TURN_START
from stages.corpus.tokenizer_files import QWEN2_PATTERN

PAD = "<|pad|>"
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END, PAD)


def train_tokenizer(texts: Sequence[str], vocab: int):
    """A byte-level BPE tokenizer with Qwen2's normaliser and pre-tokenizer, so that llama.cpp reads it as `qwen2`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
