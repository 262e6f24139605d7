"""BLEU between completions and gold solutions, by sacrebleu, with a bootstrap interval.

`bleu` is taken of normalised texts, so that no notation of the answer is favoured; `bleu_raw` of the texts as they are.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from stages.corpus.marks import TAGS
from stages.harness.errors import InputError
from stages.scoring.answers import find_declaration, plain_form, until_stop

if TYPE_CHECKING:  # numpy and sacrebleu take a third of a second to import
    import numpy as np

_TAGS = re.compile("|".join(map(re.escape, TAGS)))
_CALCULATOR_MARKS = re.compile(r"<<[^<>]*>>")


def normalised_completion(completion: str) -> str:
    """The completion up to its stop token, without tags, its declared answer on a line `#### N`, space tidied.

    A `<SOLUTION>` or `####` declaration becomes that line where it stands. A box often stands in a sentence: it gives
    way to the bare number, and the line follows. N is written as in most gold answers: digits, no commas, no `$`.
    """
    text = until_stop(completion)
    found = find_declaration(completion)
    if found:
        answer = plain_form(found.answer)
        line = f"\n#### {answer}\n"
        before, after = text[: found.start], text[found.end :]
        if text.startswith("\\", found.start):
            sentence_end, _, after = after.partition("\n")
            line = answer + sentence_end + line
        text = before + line + after
    return _tidy(_TAGS.sub(" ", text))


def normalised_reference(answer: str) -> str:
    """A GSM8K gold answer without its `<<...>>` calculator marks, its final number written as in a completion."""
    return normalised_completion(_CALCULATOR_MARKS.sub("", answer))


def _tidy(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


@cache
def _metric():
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


@lru_cache(maxsize=2**16)
def _word_tokens(word: str) -> list[str]:
    return _metric().tokenizer(word).split()


def _tokens(text: str) -> list[str]:
    """The 13a tokens of a text, a word at a time, as words come again and again: half the time of the whole text.

    The same tokens, since 13a never looks across white space, but for a line's last hyphen, which joins it to the next.
    """
    return [token for word in text.rstrip().replace("-\n", "").split() for token in _word_tokens(word)]


def _grams(tokens: list[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def sentence_statistics(completions: Sequence[str], references: Sequence[str]) -> "np.ndarray":
    """What corpus BLEU needs of each pair: int array (pairs, 10) of lengths, matches and totals of 1- to 4-grams.

    The columns are sacrebleu's own, but counted here in half its time. Raises InputError where there is nothing
    to score or the lengths differ.
    """
    import numpy as np

    if not completions or len(completions) != len(references):
        counts = f"{len(completions)} and {len(references)}"
        raise InputError(f"BLEU needs as many completions as references, and one at least: got {counts}")
    rows = []
    for completion, reference in zip(completions, references, strict=True):
        ours, gold = _tokens(completion), _tokens(reference)
        matches, totals = [], []
        for order in range(1, _metric().max_ngram_order + 1):
            gold_counts = Counter(_grams(gold, order))
            # Only what the reference holds can match: the rest is not counted at all.
            ours_counts = Counter(filter(gold_counts.__contains__, _grams(ours, order)))
            matches.append(sum(min(count, gold_counts[gram]) for gram, count in ours_counts.items()))
            totals.append(max(0, len(ours) - order + 1))
        rows.append([len(ours), len(gold), *matches, *totals])
    return np.array(rows)


def score(statistics: "np.ndarray") -> float:
    """Corpus BLEU, 0 to 1, of sentence statistics of shape (pairs, 10)."""
    return _metric()._compute_score_from_stats(statistics.sum(axis=0).tolist()).score / 100


def interval(statistics: "np.ndarray", seed: int, resamples: int = 1000) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of corpus BLEU, 0 to 1, resampling pairs (Koehn 2004, EMNLP)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    pairs = len(statistics)
    scores = [score(statistics[generator.integers(pairs, size=pairs)]) for _ in range(resamples)]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


@cache
def signature() -> str:
    """sacrebleu's own description of what is computed, to be printed beside the scores."""
    _metric().corpus_score(["a"], [["a"]])  # the metric knows its number of references only once it has met some
    return str(_metric().get_signature())


def corpus_bleu(completions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU, 0 to 1, and its signature."""
    return score(sentence_statistics(completions, references)), signature()


def bleu_interval(
    completions: Sequence[str], references: Sequence[str], seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """The 95% bootstrap interval (low, high) of corpus BLEU, 0 to 1."""
    return interval(sentence_statistics(completions, references), seed, resamples)
