"""What counts as an answer, and as the same answer."""

import random
import subprocess
import sys
from fractions import Fraction

import pytest

from stages.harness.errors import InputError
from stages.scoring.answers import (
    equal,
    extract_flexible,
    extract_solution_tag,
    extract_strict,
    gold_answer,
    parse_number,
    plain_form,
)
from stages.scoring.verdicts import judge

NUMBERS = {
    "plain": [("18", 18), ("0", 0), ("007", 7), ("1080", 1080), ("+18", 18), ("  18\n", 18), ("109200000", 109200000)],
    "negative": [("-18", -18), ("- 18", -18), ("−18", -18), ("–18", -18), ("‑18", -18), ("－18", -18), ("-0", 0)],
    "money": [
        ("$18", 18), ("$ 18", 18), ("$18.00", 18), ("$1,234.50", "1234.5"), ("-$18", -18), ("$-18", -18), ("18$", 18),
        ("£18", 18), ("€18", 18), ("18 €", 18), ("₹18", 18), ("＄18", 18), ("18 dollars", 18), ("$18 dollars", 18),
        ("18¢", 18), ("$18/day", 18), ("18 $ per day", 18),
    ],
    "thousands": [
        ("1,080", 1080), ("850,000", 850000), ("109,200,000", 109200000), ("1，234", 1234),
        ("1,234,567.89", "1234567.89"), ("1\u202f234", 1234), ("1\u00a0234\u00a0567", 1234567),
        ("1,2", None), ("1,23", None), ("12,34", None),
        ("1,2345", None), ("1234,567", None), ("1,234,56", None), ("0,123", None), ("1 234", None), ("1'234", None),
        ("1_234", None), (",123", None),
    ],
    "decimals": [
        ("18.0", 18), ("18.00", 18), ("18.", 18), (".5", "1/2"), ("-.5", "-1/2"), ("0.1", "1/10"), ("3.14", "3.14"),
        ("0.04999999999999999", "0.04999999999999999"), ("1.2.3", None), (".", None), ("..5", None),
        ("1.234.567", None),
    ],
    "fractions": [
        ("3/4", "3/4"), ("-3/4", "-3/4"), ("3 / 4", "3/4"), ("6/3", 2), ("1 3/4", "7/4"), ("-1 3/4", "-7/4"),
        ("1 and 3/4", "7/4"), ("½", "1/2"), ("1½", "3/2"), ("1 ½ cups", "3/2"), ("3⁄4", "3/4"), ("3/4 cup", "3/4"),
        ("1,000/2", 500), ("3/0", None), ("3/4/5", None), ("1 5/4", None), ("1-3/4", None), ("/4", None), ("3/", None),
    ],
    "percent": [
        ("50%", 50), ("50 %", 50), ("50 percent", 50), ("12.5%", "12.5"), ("５０％", 50), ("-5%", -5), ("%", None),
    ],
    "units": [
        ("18 eggs", 18), ("18 dollars per day", 18), ("18 km/h", 18), ("18km", 18), ("18 sq. ft.", 18), ("18°C", 18),
        ("18 m²", 18), ("18 cm^2", 18), ("18 (eggs)", 18), ("18-inch", 18), ("18 o'clock", 18), ("18 человек", 18),
        ("18 eggs, all told", 18), ("18th", 18), ("2 dozen", 2), ("8 quarters", 8), ("18 eggs each.", 18),
    ],
    "scales": [
        ("3 million", 3000000), ("$1.5 million", 1500000), ("2 thousand dollars", 2000), ("18 hundred", 1800),
        ("18k", None), ("18 K", None), ("5 millions", None),
    ],
    "scientific": [
        ("1e3", 1000), ("1E3", 1000), ("1.2e+3", 1200), ("12e-1", "1.2"), ("1.2 x 10^3", 1200), ("1.2×10^3", 1200),
        ("1.2 * 10^3", 1200), ("1.2×10³", 1200), ("5 x 10⁻¹", "1/2"), (r"1.2 \times 10^{3}", 1200),
        (r"1.2 \cdot 10^3 meters", 1200), ("1e999999999", None), ("1e-999999999", None), ("1 x 10^99999", None),
        ("1e1e1", None), ("e5", None), ("10²", None),
    ],
    "other digits": [
        ("１８", 18), ("٣", 3), ("۱۸", 18), ("१८", 18), ("１，２３４．５", "1234.5"), ("٣٫٥", "3.5"), ("\u200b18\ufeff", 18),
        ("²", None), ("①", None), ("Ⅷ", None), ("十八", None),
    ],
    "LaTeX": [
        (r"\boxed{18}", 18), (r"$\boxed{18}$", 18), (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4"),
        (r"\frac34", "3/4"), (r"-\frac{3}{4}", "-3/4"), (r"1\frac{3}{4}", "7/4"), (r"\$18", 18),
        (r"$\$18$", 18), (r"18\%", 18),
        (r"18\text{ eggs}", 18), (r"18 \, \text{dollars}", 18), (r"\text{18}", 18), (r"\mathbf{18}", 18), ("$18$", 18),
        ("$$18$$", 18), (r"\(18\)", 18), (r"\[18\]", 18), ("1{,}234", 1234), (r"1\,234", 1234), (r"10,\!000", 10000),
        (r"90^\circ", 90), (r"90^{\circ}", 90), (r"18~\text{cm}^2", 18), (r"\left(18\right)", 18), (r"\mbox{18}", 18),
        (r"\sqrt{18}", None), (r"\frac{3}{0}", None), (r"\frac{a}{4}", None), (r"2^3", None), (r"\approx 18", None),
    ],
    "around": [
        ("**18**", 18), ("*18*", 18), ("`18`", 18), ('"18"', 18), ("“18”", 18), ("(18)", 18), ("[18]", 18),
        ("(18 eggs)", 18), ("18!", 18), ("18;", 18), ("18...", 18), ("**$1,234.**", 1234), ("((18))", 18),
        ("18)", None), ("(3)(4)", None),
    ],
    "names": [
        ("= 18", 18), ("x = 18", 18), ("Answer: 18", 18), ("**Answer:** 18", 18), ("The answer is 18.", 18),
        ("Janet's profit: $18", 18), ("about 18", None), ("~18", None), ("not 18", None), ("less than 18", None),
    ],
    "several": [
        ("3 or 4", None), ("3 or four", None), ("18 and a half", None), ("18 and 19", None), ("3-4", None),
        ("3–4", None), ("3 + 4 = 7", None), ("18 = 18", None), ("18, 19", None), ("18 19", None),
        ("3:30", None), ("3:4", None),
        ("3/4/2020", None), ("2 hours 30 minutes", None), ("18 to twenty", None), ("--18", None), ("18-", None),
        ("18 + x", None), ("0x12", None),
    ],
    "nothing": [("", None), ("   ", None), ("none", None), ("eighteen", None), ("$", None), ("-", None), ("nan", None),
                ("inf", None), ("9" * 201, None), ("<SOLUTION>18", None), ("18?", None)],
}  # fmt: skip
CASES = [(text, value) for cases in NUMBERS.values() for text, value in cases]


def test_the_table_is_as_long_as_it_should_be():
    assert len({text for text, _ in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize(("text", "value"), CASES)
def test_a_text_is_one_number_or_none(text, value):
    assert parse_number(text) == (None if value is None else Fraction(value))


DECLARED = [
    # notation, the strict answer, the solution tag alone
    ("so <SOLUTION>18</SOLUTION>", "18", "18"),
    ("<SOLUTION> $18 \n</SOLUTION><|im_end|>", "$18", " $18 \n"),
    ("<SOLUTION>17</SOLUTION> no, <SOLUTION>18</SOLUTION>", "18", "18"),
    ("<SOLUTION><SOLUTION>18</SOLUTION></SOLUTION>", "18", "18"),
    ("<SOLUTION>17</SOLUTION> or <SOLUTION>18", "17", "17"),
    ("<SOLUTION>18", None, None),
    ("18</SOLUTION>", None, None),
    ("<solution>18</solution>", None, None),
    ("<SOLUTION></SOLUTION>", "", ""),
    ("<SOLUTION>18</SOLUTION><|im_end|><SOLUTION>19</SOLUTION>", "18", "18"),
    ("<SOLUTION>18<|endoftext|></SOLUTION>", None, None),
    (r"<SOLUTION>\boxed{18}</SOLUTION>", r"\boxed{18}", r"\boxed{18}"),
    ("<SOLUTION>#### 18</SOLUTION>", "#### 18", "#### 18"),
    (r"The answer is $\boxed{18}$.", "18", None),
    (r"\boxed{\text{18 eggs}}", r"\text{18 eggs}", None),
    (r"\boxed{\frac{3}{4}} cups", r"\frac{3}{4}", None),
    (r"\boxed{17} then \boxed {18}", "18", None),
    (r"\boxed{\boxed{18}}", "18", None),
    (r"\boxed{18", None, None),
    (r"\boxed{17} and \boxed{18", "17", None),
    (r"\boxed{\{18\}}", r"\{18\}", None),
    (r"\fbox{18}", "18", None),
    ("text\n#### 18", "18", None),
    ("####18", "18", None),
    ("#### $1,234.50 per day\nDone.", "$1,234.50 per day", None),
    ("#### 17\n#### 18<|endoftext|>\n#### 19", "18", None),
    ("#### 18</SOLUTION>", "18", None),
    ("**#### 18**", "18**", None),
    ("#### Explanation", None, None),
    (r"\boxed{18}" + "\n#### Explanation", "18", None),
    # the last in the text wins, whatever its notation
    (r"<SOLUTION>17</SOLUTION> \boxed{18}", "18", "17"),
    (r"\boxed{17} <SOLUTION>18</SOLUTION>", "18", "18"),
    ("#### 17\n<SOLUTION>18</SOLUTION>", "18", "18"),
    ("<SOLUTION>17</SOLUTION>\n#### 18", "18", "17"),
    ("#### 17 <SOLUTION>18</SOLUTION>", "18", "18"),
    (r"\boxed{17}" + "\n#### 18", "18", None),
    # a last line "A: N" counts only alone
    ("2 * 9 = 18\nA: 18", "18", None),
    ("2 * 9 = 18\nA: 18\nQ: what?", None, None),
    ("A: eighteen", None, None),
    ("#### 17\nA: 18", "17", None),
    ("18", None, None),
    ("The answer is 18.", None, None),
    ("", None, None),
    ("<|im_end|>#### 18", None, None),
]


@pytest.mark.parametrize(("completion", "strict", "tag"), DECLARED)
def test_the_declared_answer_is_the_last_complete_one(completion, strict, tag):
    assert extract_strict(completion) == strict
    assert extract_solution_tag(completion) == tag


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("It is 18.", "18"),
        ("First 17, then $1,234.50.", "1,234.50"),
        ("<<9*2=18>>18 eggs", "18"),
        ("10-3", "3"),
        ("16 - 3", "3"),
        ("it drops to -3", "-3"),
        ("a loss of -$3", "-$3"),
        ("we need 3/4 of it", "3/4"),
        ("we need 1 3/4 cups", "1 3/4"),
        (r"so \frac{3}{4}", "3/4"),
        ("１８個", "18"),
        ("18 cm^2", "18"),
        ("1.2 x 10^3 m", "1.2 x 10^3"),
        ("18\nno more", "18"),
        ("18<|im_end|>19", "18"),
        ("none", None),
        ("", None),
    ],
)
def test_the_flexible_answer_is_the_last_number(completion, answer):
    assert extract_flexible(completion) == answer


@pytest.mark.parametrize(
    ("answer", "value"),
    [("9 * 2 = <<9*2=18>>18\n#### 18", 18), ("#### 1,080", 1080), ("18", 18), ("-5", -5), ("x\nA: 18", 18)],
)
def test_the_gold_answer_follows_the_last_mark_or_stands_alone(answer, value):
    assert gold_answer(answer) == value


@pytest.mark.parametrize("answer", ["", "#### ", "#### eighteen", "18 eggs or 19", "It is 2.\nShe has 18.", None, 18])
def test_a_gold_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(InputError, match="gold answer"):
        gold_answer(answer)


def test_equality_is_exact():
    assert equal("18.0", Fraction(18)) and equal(Fraction(3, 4), Fraction(3, 4)) and equal("0.1", Fraction(1, 10))
    assert not equal("18.0000001", Fraction(18)) and not equal(None, Fraction(0)) and not equal("", Fraction(0))
    assert not equal(str(2**53 + 1), Fraction(2**53))


def test_the_plain_form_drops_what_gold_answers_do_not_have():
    texts = ["$1,080", "18.0", "18.5", "3/4", "soon"]
    assert [plain_form(text) for text in texts] == ["1080", "18", "18.5", "3/4", "soon"]


STYLES = [
    "{}", " {} ", "{}.", "${}", "-${}", "€{}", "{} eggs", "{} dollars per day", "{}%", "({})", "**{}**", "x = {}",
    "${}$", r"\boxed{{{}}}", r"\${}", r"{}\%", r"{}\text{{ eggs}}", r"{} \, \text{{eggs}}", "Answer: {}",
    "The answer is {}",
    "+{}", "−{}", "`{}`",
]  # fmt: skip
NOTATIONS = ["<SOLUTION>{}</SOLUTION>", "so\n#### {}", r"so $\boxed{{{}}}$", "so\n#### {}\n<|im_end|> 7", "A: {}"]
ARABIC_INDIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")


def ways_to_write(value: int) -> list[str]:
    """A number of 0 or more in every accepted style of digits, each put into every style of surroundings."""
    digits = [str(value), f"{value:,}", f"{value:,}.0", f"{value}.00", f"{2 * value}/2", f"{value * 10}e-1"]
    digits += [str(value).translate(ARABIC_INDIC), f"{value:,}".replace(",", "{,}"), rf"\frac{{{3 * value}}}{{3}}"]
    return [style.format(text) for text in digits for style in STYLES]


def test_the_style_of_a_number_never_changes_its_verdict():
    chance = random.Random(7)
    for _ in range(20):
        value = chance.randrange(10 ** chance.randint(1, 8))
        for text in ways_to_write(value):
            gold = Fraction(-value if text.startswith(("-", "−")) else value)
            assert parse_number(text) == gold, text
            notation = chance.choice(NOTATIONS)
            assert judge(notation.format(text), gold).correct, notation.format(text)
            assert not judge(notation.format(text), gold + 1).correct, notation.format(text)


@pytest.mark.parametrize(
    "piece",
    ["9", "1,", ",234", " ", "1 ", "1/", "-", "a", "{", "*", ".", "x10^", "1e", "is ", "\\frac{", "\\boxed{",
     "\\boxed{}", "####", "<SOLUTION>", "<SOLUTION></SOLUTION>", "A: ", "²", "٣", "1 1/", "(", "^ ",
     "\u2009123", "\n", "#### 1\n"],
)  # fmt: skip
def test_hostile_text_comes_to_an_end(piece):
    text = piece * (100_000 // len(piece))  # what took quadratic time would not be back today
    for hostile in (text, "1" + text + "1"):
        assert parse_number(hostile) is None
        for extract in (extract_strict, extract_solution_tag):
            found = extract(hostile)
            assert found is None or found in hostile
        last = extract_flexible(hostile)
        assert last is None or last[-1].isdigit()


def test_random_text_never_raises():
    chance = random.Random(3)
    pieces = [*"0123456789 .,/-+$%eEx^{}()*=\\\n½²٣−", "####", "\\boxed{", "\\frac", "<SOLUTION>", "</SOLUTION>", "A:"]
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randrange(25)))
        parse_number(text), judge(text, Fraction(3))


def test_reading_answers_imports_nothing_heavy():
    code = "import sys, stages.scoring.answers, stages.training.rewards; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "scipy", "sacrebleu", "torch"} & set(modules)
