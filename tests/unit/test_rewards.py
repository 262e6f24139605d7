"""The rewards order completions as a teacher would."""

import random

import pytest

from stages.harness.errors import InputError
from stages.training.rewards import check_exact_answer, check_final_answer, distinct, match_format_approximately, match_format_exactly

WORKING = "<start_working_out>9 * 2 = 18<end_working_out>"
GOOD = f"{WORKING}<SOLUTION>18</SOLUTION>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (GOOD, 3.0),
        (f"\n {WORKING}\n\n<SOLUTION>\n18\n</SOLUTION>\n", 3.0),
        (f"{GOOD}<|im_end|>", 3.0),
        (f"{GOOD}\n<|im_end|>\n<|endoftext|><|endoftext|> ", 3.0),
        ("<start_working_out>a\nb\nc<end_working_out><SOLUTION>any text</SOLUTION>", 3.0),
        (f"Sure! {GOOD}", 0.0),
        (f"{GOOD} Bye", 0.0),
        (f"{GOOD}<|im_end|>Bye", 0.0),
        (f"{WORKING} so <SOLUTION>18</SOLUTION>", 0.0),
        (f"<SOLUTION>18</SOLUTION>{WORKING}", 0.0),
        ("9 * 2 = 18<end_working_out><SOLUTION>18</SOLUTION>", 0.0),
        (f"{WORKING}<SOLUTION>18", 0.0),
        (WORKING, 0.0),
        (f"{WORKING}{GOOD}", 0.0),
        (f"{GOOD}<SOLUTION>18</SOLUTION>", 0.0),
        ("<start_working_out><end_working_out><SOLUTION>18</SOLUTION>", 0.0),
        (f"{WORKING}<SOLUTION> \n</SOLUTION>", 0.0),
        ("<start_working_out>a<|im_end|><end_working_out><SOLUTION>18</SOLUTION>", 0.0),
        ("<start_working_out>a<SOLUTION>18</SOLUTION><end_working_out>", 0.0),
        (GOOD.replace("SOLUTION", "solution"), 0.0),
        ("", 0.0),
    ],
)
def test_the_exact_format_is_the_whole_form_and_nothing_else(completion, reward):
    assert match_format_exactly([completion]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (GOOD, 1.5),
        ("<end_working_out><SOLUTION></SOLUTION>", 1.5),
        (f"chatter {GOOD} chatter", 1.5),
        (f"{WORKING}<SOLUTION>18", 0.0),
        (WORKING, -1.5),
        ("<SOLUTION>18</SOLUTION>", 0.0),
        (f"{GOOD}<SOLUTION>18</SOLUTION>", -1.5),
        (f"{WORKING}{GOOD}", 0.0),
        ("<start_working_out>", -3.0),
        ("", -3.0),
    ],
)
def test_the_approximate_format_counts_each_tag(completion, reward):
    assert match_format_approximately([completion]) == [reward]


FINAL = [
    # gold, the text between the tags, reward
    ("18", "18", 5.0),
    ("9 * 2 = <<9*2=18>>18\n#### 18", "18", 5.0),
    ("#### 1,080", "1,080", 5.0),
    ("#### 1,080", "1080", 5.0),
    ("1080", "1080", 5.0),
    ("0", "0", 5.0),
    ("-5", "-5", 5.0),
    ("18", " 18 ", 3.5),
    ("18", "\n18", 3.5),
    ("18", "$18", 3.5),
    ("18", "18.0", 3.5),
    ("18", "18.", 3.5),
    ("18", "18 eggs", 3.5),
    ("18", "36/2", 3.5),
    ("18", r"\boxed{18}", 3.5),
    ("18", "１８", 3.5),
    ("1080", "1,080", 3.5),
    ("#### 1,080", "$1,080.00", 3.5),
    ("-5", "−5", 3.5),
    ("0", "$0.00", 3.5),
    ("18", "19", 2.0),
    ("18", "17", 2.0),
    ("10", "11", 2.0),
    ("10", "9", 2.0),
    ("1,000", "1,100", 2.0),
    ("-10", "-11", 2.0),
    ("0", "0.1", 2.0),
    ("10", "11.0001", 1.0),
    ("10", "12", 1.0),
    ("10", "8", 1.0),
    ("0", "-0.2", 1.0),
    ("10", "22", -3.5),  # e = 1.2, x = 1
    ("10", "-2", -3.5),
    ("0", "1.2", -3.5),
    ("10", "42", -4.0),  # e = 3.2, x = 3
    ("18", "eighteen", -4.5),
    ("18", "18 or 19", -4.5),
    ("18", "", -4.5),
    ("0", "", -4.5),
]


@pytest.mark.parametrize(("gold", "text", "reward"), FINAL)
def test_the_final_answer_is_rewarded_by_value_and_form(gold, text, reward):
    assert check_final_answer([f"{WORKING}<SOLUTION>{text}</SOLUTION>"], answer=[gold]) == [reward]


@pytest.mark.parametrize(
    "completion", ["18", "#### 18", r"\boxed{18}", "<SOLUTION>18", WORKING, "<|im_end|><SOLUTION>18</SOLUTION>", ""]
)
def test_only_the_solution_tags_are_read(completion):
    assert check_final_answer([completion], answer=["18"]) == [-4.5]


def final(text: str, gold: str = "18") -> float:
    return check_final_answer([f"<SOLUTION>{text}</SOLUTION>"], answer=[gold])[0]


def test_exact_beats_right_in_another_form_beats_near_beats_far_beats_none():
    rewards = [final(text) for text in ("18", "$18", "19", "21", "22", "40", "4000", "none")]
    assert all(better > worse for better, worse in zip(rewards, rewards[1:], strict=False))


@pytest.mark.parametrize("right", ["$18", " 18", "18.0", "18 eggs", "18.", "36/2", r"\$18", "１８"])
def test_a_near_miss_never_beats_a_right_answer_in_another_form(right):
    # The well-known public version gives 19 for 18 more than a right "$18".
    assert final(right) > max(final(near) for near in ("19", "17", "18.1", "17.99999"))


@pytest.mark.parametrize("gold", ["18", "0", "-7", "1,000,000", "0.5"])
def test_a_farther_answer_never_earns_more(gold):
    value = float(gold.replace(",", ""))
    distances = [step * (abs(value) or 1) / 50 for step in range(1, 400)]
    rewards = [final(f"{value + distance:.6f}", gold) for distance in distances]
    assert all(first >= second for first, second in zip(rewards, rewards[1:], strict=False))
    far = [reward for reward in rewards if reward < 0]
    assert -2.5 >= far[0] > -2.6 and far[-1] > -4.5
    assert all(first > second for first, second in zip(far, far[1:], strict=False))


def test_chat_completions_and_batches_are_read_as_trl_gives_them():
    chat = [[{"role": "assistant", "content": GOOD}], [{"role": "assistant", "content": None}], []]
    extra = {"prompts": ["?"] * 3, "completion_ids": [[1]] * 3, "answer": ["18"] * 3, "trainer_state": None}
    assert match_format_exactly(chat, **extra) == [3.0, 0.0, 0.0]
    assert match_format_approximately(chat, **extra) == [1.5, -3.0, -3.0]
    assert check_final_answer(chat, **extra) == [5.0, -4.5, -4.5]


def test_a_gold_answer_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="gold answer"):
        check_final_answer([GOOD], answer=["eighteen"])


def test_random_completions_never_raise_and_stay_on_the_scale():
    chance = random.Random(5)
    pieces = [*"0123456789.,-/$%e \n\\{}½²٣−", "<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>",
              "<|im_end|>", "\\frac", "\\boxed{", "####", "eggs", "1e999", "\ud800"]  # fmt: skip
    completions = ["".join(chance.choices(pieces, k=chance.randrange(30))) for _ in range(5000)]
    completions += [f"<SOLUTION>{text}</SOLUTION>" for text in completions]
    answers = [chance.choice(["18", "0", "-3", "1,080", "0.5"]) for _ in completions]
    assert set(match_format_exactly(completions)) <= {0.0, 3.0}
    assert set(match_format_approximately(completions)) <= {-3.0, -1.5, 0.0, 1.5}
    rewards = check_final_answer(completions, answers)
    assert all(reward in (5.0, 3.5, 2.0, 1.0) or -4.5 <= reward <= -2.5 for reward in rewards)


def test_distinct_counts_a_completion_once_for_each_prompt():
    prompts, completions = ["a", "a", "a", "b", "b"], ["1", "2", "1", "1", "1"]
    assert distinct(prompts, completions, answer=["1"] * 5) == [1.0, 1.0, 0.0, 1.0, 0.0]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    replies = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert distinct(chats, replies) == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert distinct([], []) == []


def test_an_exact_reward_pays_right_answers_alike_and_no_nearness():
    def text(answer):
        return f"{WORKING}<SOLUTION>{answer}</SOLUTION>"

    answers = ["18", "18.0", "$18", "19", "17", "1000", "no number", ""]
    graded, exact = (f([text(a) for a in answers], ["18"] * 8) for f in (check_final_answer, check_exact_answer))
    assert exact[:3] == graded[:3] == [5.0, 3.5, 3.5]
    assert exact[3:6] == [-2.5] * 3
    assert exact[6:] == graded[6:] == [-4.5, -4.5]
