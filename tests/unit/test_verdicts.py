"""Rows in, scores out."""

from fractions import Fraction

import pytest

from stages.harness.errors import InputError
from stages.scoring.answers import gold_answer
from stages.scoring.bleu import corpus_bleu
from stages.scoring.statistics import wilson
from stages.scoring.verdicts import Verdict, by_steps, join, judge, judge_all, model_scores

GOLD = [
    {"id": "p1", "question": "?", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"},
    {"id": "p2", "question": "?", "answer": "2 * 5 = <<2*5=10>>10\n10 * 108 = <<10*108=1080>>1,080\n#### 1,080"},
    {"id": "p3", "question": "?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"id": "p4", "question": "?", "answer": "It is 5.\n#### 5"},
]
PREDICTIONS = [
    {"id": "p1", "completion": "9 * 2 = 18\n#### 18", "finish_reason": "stop"},
    {"id": "p2", "completion": r"so it is \boxed{\$1{,}080}", "finish_reason": "stop"},
    {"id": "p3", "completion": "<SOLUTION>8</SOLUTION>", "finish_reason": "stop"},
    {"id": "p4", "completion": "It is 5", "finish_reason": "length"},
]


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("<SOLUTION>18</SOLUTION>", Verdict("18", True, True, True)),
        ("#### $18.00 per day", Verdict("$18.00 per day", True, True, True)),
        (r"$\boxed{18}$ for 9 eggs", Verdict("18", True, False, True)),
        ("#### 19", Verdict("19", False, False, True)),
        ("#### 19 and then 18", Verdict("19 and then 18", False, True, False)),
        ("It is 18.", Verdict(None, False, True, False)),
        ("<SOLUTION></SOLUTION>", Verdict("", False, False, False)),
        ("<SOLUTION>18", Verdict(None, False, True, False)),
        ("", Verdict(None, False, False, False)),
    ],
)
def test_a_completion_is_judged_strictly_and_flexibly(completion, verdict):
    assert judge(completion, Fraction(18)) == verdict


@pytest.mark.parametrize(
    ("ending", "gold", "label"),
    [
        # Forms that answers take in GSM8K's published model solutions, with the labels that stand beside them there.
        ("so each raised <<125000/20=6250.0>>6,250\nA: 6,250", "6,250", True),
        ("= <<125000/20=6250.0>>6,250.\nA: 6250", "A: 6,250", True),
        ("he climbs <<6000-3000=3000>>3,000 feet\nA: 3,000", "3000", True),
        ("change worth <<20-14.99=5.01>>5.01\nA: 5", "5", True),
        ("a profit of <<90-180=-90>>-90.\nA: 90", "90", True),
        ("she has <<48+5.8=53.8>>53.8 minutes\nA: 53.8", "53", False),
        ("<<140/60=2.3333333333333335>>2.3333333333333335 minutes.\nA: 2.3333333333333335", "2", False),
        ("$<<2+12.8=14.8>>14.80 for all\nA: 14.80", "7", False),
        ("8000-2400=<<8000-2400=5600>>5600 pounds.\nA: 5", "5600", False),
        ("Peter is 10+John's age\nA: 10+John's age", "50", False),
        ("at 12/60=1/5 pm\nA: 1/5", "2", False),
        ("is <<9.20-11.0=-1.8>>-1.8 billion dollars\nA: -1.8 billion", "2", False),
        ("-20.0/2 = <<-20.0/2=-10.0>>-10.0 loaves\nA: -10", "10", False),
        ("Adding x to both sides, we get 33 + x = 2x + x\nSubtracting x from both", "22", False),
        ("For the thirteenth glass Kylar needs to pay 5 * 1", "64", False),
        ("25", "123", False),
    ],
)
def test_verdicts_are_the_labels_that_others_gave(ending, gold, label):
    assert judge(ending, gold_answer(gold)).correct is label


def test_a_models_object_has_exactly_the_fields_of_metrics_json():
    scores = model_scores(judge_all(PREDICTIONS, GOLD), seed=1, resamples=50)
    low, high = wilson(2, 4)
    assert list(scores) == [
        "pass_at_1", "pass_at_1_low", "pass_at_1_high", "pass_at_1_flexible",
        "bleu", "bleu_low", "bleu_high", "bleu_raw", "unparsed", "truncated", "n",
    ]  # fmt: skip
    assert (scores["pass_at_1"], scores["pass_at_1_flexible"], scores["n"]) == (0.5, 0.75, 4)
    assert (scores["pass_at_1_low"], scores["pass_at_1_high"]) == (round(low, 6), round(high, 6))
    assert (scores["unparsed"], scores["truncated"]) == (0.25, 0.25)
    assert scores["bleu_low"] <= scores["bleu"] <= scores["bleu_high"]
    raw, _ = corpus_bleu([row["completion"] for row in PREDICTIONS], [row["answer"] for row in GOLD])
    assert scores["bleu_raw"] == round(raw, 6)
    assert all(value == round(value, 6) for value in scores.values())


def test_the_same_rows_and_seed_give_the_same_object():
    one, other = judge_all(PREDICTIONS, GOLD), judge_all(PREDICTIONS[::-1], GOLD)
    assert model_scores(one, seed=1) == model_scores(other, seed=1)


def test_gold_answers_as_predictions_score_one():
    scores = model_scores(judge_all([{"completion": row["answer"]} for row in GOLD], GOLD), seed=1, resamples=20)
    assert scores["pass_at_1"] == scores["pass_at_1_flexible"] == scores["bleu_raw"] == 1
    assert scores["unparsed"] == scores["truncated"] == 0


def test_scores_by_steps_count_the_marks_or_take_the_rows_word():
    assert by_steps(judge_all(PREDICTIONS, GOLD)) == {
        "0": {"pass_at_1": 0.0, "pass_at_1_flexible": 1.0, "n": 1},
        "1": {"pass_at_1": 0.5, "pass_at_1_flexible": 0.5, "n": 2},
        "2": {"pass_at_1": 1.0, "pass_at_1_flexible": 1.0, "n": 1},
    }
    counted = [row | {"steps": steps} for row, steps in zip(GOLD, [10, 2, 2, 10], strict=True)]
    assert by_steps(judge_all(PREDICTIONS, counted)) == {
        "2": {"pass_at_1": 0.5, "pass_at_1_flexible": 0.5, "n": 2},
        "10": {"pass_at_1": 0.5, "pass_at_1_flexible": 1.0, "n": 2},
    }


def without_ids(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "id"} for row in rows]


def test_rows_join_by_id_in_the_gold_order():
    assert join(PREDICTIONS[::-1], GOLD) == list(zip(PREDICTIONS, GOLD, strict=True))
    numbered = [row | {"id": number} for number, row in enumerate(GOLD)]
    as_text = [row | {"id": str(number)} for number, row in enumerate(PREDICTIONS)]
    assert [row["id"] for _, row in join(as_text[::-1], numbered)] == [0, 1, 2, 3]


def test_rows_without_ids_join_by_order():
    for predictions, gold in [(PREDICTIONS, without_ids(GOLD)), (without_ids(PREDICTIONS), GOLD)]:
        assert join(predictions, gold) == list(zip(predictions, gold, strict=True))


def test_ids_that_are_row_numbers_find_their_rows():
    shuffled = [PREDICTIONS[number] | {"id": number} for number in (2, 0, 3, 1)]
    assert [prediction["id"] for prediction, _ in join(shuffled, without_ids(GOLD))] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("predictions", "gold", "message"),
    [
        ([], [], "no predictions"),
        (PREDICTIONS[:3], GOLD, "3 predictions for 4 gold rows"),
        (PREDICTIONS[:3] + [{"id": "p9", "completion": ""}], GOLD, "prediction row 4: the gold rows have no id 'p9'"),
        (PREDICTIONS[:3] + PREDICTIONS[:1], GOLD, "prediction row 4: id 'p1' has come before"),
        (PREDICTIONS, GOLD[:3] + GOLD[:1], "gold row 4: id 'p1' has come before"),
        (PREDICTIONS[:3] + [{"completion": ""}], GOLD, "prediction row 4 has no id"),
        (PREDICTIONS[:1] + [{"id": "p2"}] + PREDICTIONS[2:], GOLD, "prediction row 2: 'completion' is missing"),
        ([{"id": "p1", "completion": None}] + PREDICTIONS[1:], GOLD, "prediction row 1: 'completion'"),
        (PREDICTIONS, GOLD[:3] + [{"id": "p4", "question": "?"}], "gold row 4: 'answer' is missing"),
        (PREDICTIONS, GOLD[:3] + [{"id": "p4", "answer": "#### five"}], "gold row 4: the gold answer '#### five'"),
    ],
)
def test_rows_that_do_not_fit_are_named(predictions, gold, message):
    with pytest.raises(InputError, match=message):
        judge_all(predictions, gold)
