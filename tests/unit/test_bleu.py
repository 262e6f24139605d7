"""BLEU is sacrebleu's, taken of texts that no notation favours."""

import random

import pytest
import sacrebleu

from stages.harness.errors import InputError
from stages.scoring.bleu import (
    bleu_interval,
    corpus_bleu,
    normalised_completion,
    normalised_reference,
    sentence_statistics,
    signature,
)

GOLD = "She sells 9 * 2 = $<<9*2=18>>18.\nThat is all.\n#### 1,018"


def random_texts(count: int, words: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    stock = ["eggs", "18", "1,018.5", "$3.", "a-\n", "-\n", "3-4", "don't", "x,", ".5", "..", "“so”", "&lt;b&amp;",
             "\n", "\n\n", "\u00a0", "#### 7", "{a|b}", "٣.", "<skipped>", ",,", "5.", "½", "%"]  # fmt: skip
    return [chance.choice(" \n").join(chance.choices(stock, k=chance.randrange(1, words))) for _ in range(count)]


def test_corpus_bleu_equals_sacrebleu_on_awkward_text():
    ours, gold = random_texts(300, 30, seed=1), random_texts(300, 30, seed=2)
    score, described = corpus_bleu(ours, gold)
    assert score * 100 == pytest.approx(sacrebleu.corpus_bleu(ours, [gold]).score, abs=1e-12)
    metric = sacrebleu.BLEU()
    assert sentence_statistics(ours, gold).tolist() == metric._extract_corpus_statistics(ours, [gold])
    assert described == str(metric.get_signature()) == signature()


def test_bleu_is_one_for_the_reference_and_zero_for_nothing():
    reference = normalised_reference(GOLD)
    assert corpus_bleu([reference], [reference])[0] == pytest.approx(1)
    assert corpus_bleu([""], [reference])[0] == 0


def test_the_reference_loses_its_calculator_marks_and_nothing_else():
    assert normalised_reference(GOLD) == "She sells 9 * 2 = $18.\nThat is all.\n#### 1018"


@pytest.mark.parametrize(
    "ending",
    [
        "<SOLUTION>1018</SOLUTION>",
        "<SOLUTION> $1,018.00 </SOLUTION><|im_end|>\nmore",
        "#### 1,018",
        "#### 1018 dollars<|endoftext|>",
        "\n\n####1018  \n",
        "A: 1,018",
    ],
)
def test_every_notation_gives_the_same_normalised_text(ending):
    completion = f"<start_working_out>She sells 9 * 2 =  $18.\nThat is all.\n<end_working_out>\n{ending}"
    assert normalised_completion(completion) == normalised_reference(GOLD)


def test_a_box_in_a_sentence_leaves_the_sentence_and_adds_the_line():
    assert normalised_completion(r"So it is $\boxed{1{,}018}$." + "\nBye") == "So it is $1018$.\n#### 1018\nBye"


def test_a_completion_without_an_answer_keeps_its_words():
    assert normalised_completion("<start_working_out> It  is 5 \n\n") == "It is 5"
    assert normalised_completion("<|im_end|>more") == ""


def test_an_answer_that_is_no_number_stays_as_written():
    assert normalised_completion("<SOLUTION> 3/4 of it </SOLUTION>") == "#### 3/4 of it"


def test_the_interval_holds_the_score_and_follows_the_seed():
    gold = random_texts(200, 20, seed=3)
    chance = random.Random(4)
    others = random_texts(200, 20, seed=5)
    ours = [chance.choice(pair) for pair in zip(gold, others, strict=True)]
    low, high = bleu_interval(ours, gold, seed=1)
    assert 0 < low < corpus_bleu(ours, gold)[0] < high < 1
    assert (low, high) == bleu_interval(ours, gold, seed=1) != bleu_interval(ours, gold, seed=2)


@pytest.mark.parametrize(("completions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_unequal_or_empty_lists_are_refused(completions, references):
    with pytest.raises(InputError, match="as many completions as references"):
        corpus_bleu(completions, references)
