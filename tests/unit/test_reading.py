"""Working and answer of a model's text, whole and while it is being written."""

import pytest

from stages.corpus.chat_format import gsm8k_answer, tagged_answer
from stages.corpus.marks import TAGS
from stages.host.reading import read
from stages.scoring.answers import extract_strict

WORKING = "Sam has 6+8=14 buttons.\nThen 14-2=12 buttons."
FORMS = {
    "tagged": tagged_answer(WORKING, "12"),
    "gsm8k": gsm8k_answer(WORKING, "12"),
    "boxed": f"{WORKING}\n\\boxed{{12}}",
    "with a stop token": f"{WORKING}\n#### 12<|im_end|>\nand more",
    "a last line": f"{WORKING}\nA: 12",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_every_form_is_parted_into_working_and_answer(text):
    assert read(text) == (WORKING, "12")


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_no_mark_is_ever_seen_while_a_text_is_written(text):
    for end in range(len(text) + 1):
        working, answer = read(text[:end], ended=False)
        assert WORKING.startswith(working.removesuffix("\nA:").removesuffix("\nA")), working
        assert answer is None or "12".startswith(answer)


@pytest.mark.parametrize("form", ["tagged", "gsm8k", "boxed"])
def test_an_answer_is_seen_from_its_first_digit(form):
    begun = FORMS[form][: FORMS[form].rindex("12") + 1]
    assert read(begun, ended=False) == (WORKING, "1")


@pytest.mark.parametrize("text", [
    "<SOLUTION>12", "\\boxed{12", "I do not know.", "", "<start_working_out>\n6+8=14", "#### Explanation\nNone", "a < b", "#1 of 2",
])  # fmt: skip
def test_what_declares_nothing_has_no_answer_and_keeps_its_words(text):
    working, answer = read(text)
    assert answer is None and extract_strict(text) is None
    for tag in TAGS:
        text = text.replace(tag, "")
    assert working == text.strip()


def test_of_several_declarations_the_last_is_the_answer_and_the_others_stay():
    assert read("First \\boxed{3}.\nNo: \\boxed{4} it is.") == ("First \\boxed{3}.\nNo:  it is.", "4")


def test_a_heading_is_working_once_its_line_has_ended():
    assert read("#### Steps\n6+8=14", ended=False) == ("#### Steps\n6+8=14", None)


def test_a_fraction_in_a_box_is_whole():
    assert read(r"So \boxed{\frac{1}{2}}") == ("So", r"\frac{1}{2}")
