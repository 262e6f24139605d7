"""The procedural corpus: its sums are true, its splits are apart, and it is the same everywhere."""

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from string import Formatter

import pytest

from stages.corpus import procedural
from stages.corpus.procedural import (
    DOCUMENT_KINDS,
    FAMILIES,
    SOLVED,
    SPLITS,
    STEP_COUNTS,
    Family,
    Limits,
    as_dapo,
    as_gsm8k,
    as_openmathreasoning,
    chat_rows,
    pretraining_documents,
    problems,
    row_id,
    shared_facts,
)
from stages.harness.errors import InputError

ROOT = Path(__file__).parents[2]
EVEN = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}
SMALL = Limits(largest=10, factor=5, result=30)  # of the profile embedded
LARGE = Limits(largest=60, factor=12, result=999)  # of the profile scratch-gpu
REALISTIC = {"pretraining": 8000, "train": 4000, "validation": 500, "test": 1500}
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def every_split(limits, shares):
    return {split: problems(split, size, 7, shares, limits) for split, size in REALISTIC.items()}


@pytest.fixture(scope="module")
def small():
    return every_split(SMALL, {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2})


@pytest.fixture(scope="module")
def large():
    return every_split(LARGE, {1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.2})


@pytest.fixture(scope="module", params=["small", "large"])
def corpus(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def everything(corpus):
    return [problem for split in corpus.values() for problem in split]


def is_true(left: int, sign: str, right: int, result: int) -> bool:
    if sign == "/":
        return right > 0 and result * right == left
    return {"+": left + right, "-": left - right, "*": left * right}[sign] == result


def equations(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in EQUATION.findall(text)]


def test_every_equation_is_true_and_the_last_is_the_answer(everything):
    for problem in everything:
        solved = equations(problem.working)
        assert len(solved) == problem.steps == len(problem.working.splitlines())
        assert all(is_true(*equation) for equation in solved), problem
        assert solved[-1][-1] == problem.answer, problem


def test_every_working_uses_only_told_numbers_and_earlier_results(everything):
    for problem in everything:
        unused, results = Counter(problem.numbers), []
        for left, _, right, result in equations(problem.working):
            for operand in (left, right):
                in_words = operand == 2 and re.search("twice|back", problem.question)
                assert operand in problem.numbers or operand in results or in_words, problem
                unused[operand] = 0
            results.append(result)
        assert not +unused, f"told but not used: {problem}"


def test_answers_agree_with_sums_written_by_hand(everything):
    by_hand = {
        "buy-and-give": lambda a, b, c: a + b - c,
        "find-and-share": lambda a, b, c: (a + b) // c,
        "price-and-paid": lambda a, b, c: a * b - c,
        "trip-with-legs": lambda a, b, c, d: a + b + c + d,
        "together-and-give": lambda a, b, c: a + (a + b) - c,
        "twice-and-give": lambda a, b, c: 2 * (a + b) - c,
        "save-spend-and-share": lambda a, b, c, d: (a * b - c) // d,
        "two-prices-and-paid": lambda a, b, c, d, e: a * b + c * d - e,
        "there-and-back": lambda a, b, c, d: 2 * (a + b + c) - d,
        "two-prices-paid-and-share": lambda a, b, c, d, e, f: (a * b + c * d - e) // f,
        "earn-buy-and-share": lambda a, b, c, d, e, f: (a * b - c * d) // e + f,
        "big-and-small-groups": lambda a, b, c, d, e, f: a * b + c * d + e - f,
        "twice-share-and-add": lambda a, b, c, d, e: (2 * (a + b) - c) // d + e,
        "there-and-back-in-parts": lambda a, b, c, d, e: (2 * (a + b + c) - d) // e,
    }
    for problem in everything:
        if problem.family in by_hand:
            assert by_hand[problem.family](*problem.numbers) == problem.answer, problem


def test_questions_tell_exactly_the_numbers_of_the_tuple(everything):
    for problem in everything:
        told = sorted(map(int, re.findall(r"\d+", problem.question)))
        assert told == sorted(problem.numbers), problem
        assert problem.question.endswith("?") and problem.question.count("?") == 1
        assert not set("{}") & set(problem.question + problem.working), problem


@pytest.mark.parametrize(("fixture", "limits"), [("small", SMALL), ("large", LARGE)])
def test_numbers_and_results_stay_within_the_limits_and_reach_them(fixture, limits, request):
    told = [problem for split in request.getfixturevalue(fixture).values() for problem in split]
    results = []
    for problem in told:
        assert all(2 <= number <= limits.largest for number in problem.numbers)
        for left, sign, right, result in equations(problem.working):
            results.append(result)
            assert sign != "*" or min(left, right) <= limits.factor
            assert sign != "/" or right <= limits.factor
    assert max(number for problem in told for number in problem.numbers) == limits.largest
    assert min(results) == 2 and 0.98 * limits.result <= max(results) <= limits.result


def test_families_cover_one_to_five_steps_and_all_are_told(small, large):
    counts = Counter(len(family.steps) for family in FAMILIES)
    assert tuple(counts) == STEP_COUNTS == (1, 2, 3, 4, 5)
    assert min(counts.values()) >= 5
    for corpus, most in ((small, 4), (large, 5)):
        for told in corpus.values():
            assert {problem.family for problem in told} == {f.name for f in FAMILIES if len(f.steps) <= most}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_all_families_are_told_in_all_phrasings(corpus):
    told = {problem.question for problem in corpus["pretraining"]}
    families = {problem.family for problem in corpus["pretraining"]}
    for family in (family for family in FAMILIES if family.name in families):
        for phrasing in family.phrasings:
            pattern = "".join(
                re.escape(text) + (r"\w+" if field else "") for text, field, _, _ in Formatter().parse(phrasing)
            )
            assert any(re.fullmatch(pattern, question) for question in told), phrasing


def test_no_question_is_in_two_splits_or_twice_in_one(corpus):
    questions = {split: {problem.question for problem in told} for split, told in corpus.items()}
    assert {split: len(told) for split, told in questions.items()} == REALISTIC
    for one, other in combinations(SPLITS, 2):
        assert not questions[one] & questions[other]


def test_no_numbers_of_a_longer_family_are_in_two_splits(corpus):
    facts = {split: {(p.family, p.numbers) for p in told if p.steps > 1} for split, told in corpus.items()}
    for one, other in combinations(SPLITS, 2):
        assert facts[one] and not facts[one] & facts[other]


@pytest.mark.parametrize("limits", [SMALL, LARGE], ids=["small", "large"])
def test_the_splits_cut_every_listed_space_whole(limits):
    listed = [family for family in FAMILIES if procedural._is_listed(family, limits)]
    assert {len(family.steps) for family in listed} >= {1, 2}
    for family in listed:
        cut = procedural._fillings if len(family.steps) == 1 and limits is SMALL else procedural._numbers
        whole = range(family.fillings) if cut is procedural._fillings else family.numbers(limits)
        parts = [list(cut(family, split, limits)) for split in SPLITS]
        assert sorted(sum(parts, [])) == list(whole), family.name
        assert all(parts), family.name


def test_a_space_too_large_to_list_is_divided_in_the_same_shares(large):
    family = next(family for family in FAMILIES if family.name == "trip-with-legs")
    assert not procedural._is_listed(family, LARGE)
    splits = Counter(procedural._split_of(family, (a, b, 7, 9)) for a in range(2, 61) for b in range(2, 61))
    for split, per_cent in procedural.SPLIT_PER_CENT.items():
        assert splits[split] == pytest.approx(59 * 59 * per_cent / 100, rel=0.1)
    for split, told in large.items():
        assert all(procedural._split_of(family, p.numbers) == split for p in told if p.family == family.name)


@pytest.mark.parametrize(
    ("limits", "count", "shares"),
    [(SMALL, 900, {3: 0.5, 4: 0.5}), (LARGE, 12000, {2: 0.9, 3: 0.1})],
    ids=["small", "large"],
)
def test_numbers_repeat_only_when_the_split_has_no_more(limits, count, shares):
    told = problems("test", count, 0, shares, limits)
    uses = Counter((problem.family, problem.numbers) for problem in told)
    again = set()
    for family in FAMILIES:
        counts = [count for (name, _), count in uses.items() if name == family.name]
        if counts and max(counts) > 1:
            assert len(counts) == len(procedural._numbers(family, "test", limits))
            again.add(family.name)
    assert again and all(procedural._is_listed(family, limits) for family in FAMILIES if family.name in again)


def test_one_step_facts_are_shared_where_they_are_few_and_counted(small, large):
    one_step = [{(p.family, p.numbers) for p in small[split] if p.steps == 1} for split in ("train", "test")]
    assert shared_facts(small["train"], small["test"]) == len(one_step[0] & one_step[1]) > 50
    longer = [problem for problem in small["train"] if problem.steps > 1]
    assert shared_facts(longer, longer) == 0
    assert shared_facts(large["train"], large["train"]) > 500
    assert shared_facts(large["train"], large["test"]) == shared_facts(large["pretraining"], large["test"]) == 0


def test_step_shares_are_met_with_largest_remainders():
    def steps(count, shares):
        return Counter(problem.steps for problem in problems("train", count, 0, shares, SMALL))

    assert steps(200, {1: 0.45, 2: 0.4, 3: 0.15}) == {1: 90, 2: 80, 3: 30}
    assert steps(10, {1: 0.26, 2: 0.26, 3: 0.48}) == {1: 3, 2: 2, 3: 5}
    assert steps(3, {4: 0.0, 2: 1.0}) == {2: 3}
    families = Counter(problem.family for problem in problems("train", 700, 0, {2: 1.0}, SMALL))
    assert max(families.values()) - min(families.values()) <= 1


@pytest.mark.parametrize(
    ("split", "count", "shares", "says"),
    [
        ("train", 10, {1: 0.5, 2: 0.4}, "must sum to 1 but sum to 0.9"),
        ("train", 10, {1: 0.5, 9: 0.5}, "9 is unknown: use 1, 2, 3, 4, 5"),
        ("train", 10, {1: 1.5, 2: -0.5}, "must not be negative"),
        ("train", 10, {1: float("nan")}, "must sum to 1"),
        ("train", 10, {}, "must sum to 1"),
        ("tests", 10, {1: 1.0}, "'tests' is unknown"),
        ("train", -1, {1: 1.0}, "asks for -1"),
        ("validation", 10**8, {3: 1.0}, r"asks for 100000000 but only \d+ exist"),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(split, count, shares, says):
    with pytest.raises(InputError, match=says):
        problems(split, count, 0, shares, SMALL)


@pytest.mark.parametrize(
    ("limits", "shares", "says"),
    [
        ((10, 5, 3), {2: 1.0}, "leaves the family buy-and-give nothing to tell in validation: raise its limits"),
        ((10, 5, 2), {1: 1.0}, "fetch.numbers leaves the family buy-more nothing to tell"),
        ((60, 12, 3), {3: 1.0}, "fetch.numbers: only 0 of 10 tuples of numbers were found for the family groups-extra"),
    ],
)
def test_limits_that_leave_nothing_to_tell_are_refused_in_one_sentence(limits, shares, says):
    largest, factor, result = limits
    families = sum(len(family.steps) in shares for family in FAMILIES)
    with pytest.raises(InputError, match=says):
        problems("validation", 10 * families, 0, shares, Limits(largest=largest, factor=factor, result=result))


def test_more_than_a_drawn_space_holds_is_refused(monkeypatch):
    told = ("{name} has {a}. {He} gets {b}. How many in all?",)
    monkeypatch.setattr(procedural, "FAMILIES", (Family("sums", ("a+b",), "", told, ("{equation}.",)),))
    monkeypatch.setattr(procedural, "LISTED", 1000)
    (sums,) = procedural.FAMILIES
    held = sum(procedural._split_of(sums, numbers) == "test" for numbers in sums.numbers(LARGE))
    drawn = problems("test", held, 0, {1: 1.0}, LARGE)
    assert len({problem.numbers for problem in drawn}) == held
    with pytest.raises(InputError, match=f"only {held} of 3000 tuples of numbers were found for the family sums"):
        problems("test", 3000, 0, {1: 1.0}, LARGE)


def test_limits_are_checked_by_name():
    for key in ("largest", "factor", "result"):
        with pytest.raises(ValueError, match=f"{key}\n.*greater than or equal to 2"):
            Limits(**{"largest": 9, "factor": 5, "result": 30, key: 1})
    with pytest.raises(ValueError, match="factor must not be above largest"):
        Limits(largest=9, factor=10, result=30)


def test_a_whole_space_can_be_drawn_and_holds_no_duplicate(monkeypatch):
    tiny = Family("tiny", ("a+b",), "ab", ("{name} has {a}. {He} gets {b}. How many in all?",), ("{equation}.",))
    monkeypatch.setattr(procedural, "FAMILIES", (tiny,))
    room = 16 * len(procedural._fillings(tiny, "train", SMALL))
    drawn = problems("train", room, 0, {1: 1.0}, SMALL)
    assert len({problem.question for problem in drawn}) == room
    with pytest.raises(InputError, match=f"asks for {room + 1} but only {room} exist"):
        problems("train", room + 1, 0, {1: 1.0}, SMALL)


def test_a_family_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="tell all numbers"):
        Family("bad", ("a+b",), "", ("{name} has {a}. How many?",), ("{equation}",))
    with pytest.raises(ValueError, match="same words"):
        Family("bad", ("a+b",), "", ("{name} {a} {b}. Is it?", "{things} {a} {b}. Is it?"), ("{equation}",))
    with pytest.raises(ValueError, match="one line"):
        Family("bad", ("a+b",), "", ("{name} {a} {b}. Is it?",), ())
    for step in ("a*b", "a/b"):
        with pytest.raises(ValueError, match="that is in factors"):
            Family("bad", (step,), "a" if step == "a/b" else "", ("{name} {a} {b}. Is it?",), ("{equation}",))


def test_calculator_marks_follow_the_equation_and_strip_to_the_working(everything):
    for problem in everything:
        assert re.sub(r"<<[^>]*>>", "", problem.marked_working) == problem.working
        marks = re.findall(r"(\S+=)<<(\S+=)(\d+)>>(\d+)", problem.marked_working)
        assert len(marks) == problem.steps == problem.marked_working.count("<<")
        assert all(before == inside and result == after for before, inside, result, after in marks)


def test_rows_have_their_sources_schemas(corpus):
    problem = next(problem for problem in corpus["train"] if problem.family == "buy-and-give")
    (left, _, right, total), (_, _, given, answer) = equations(problem.working)
    identity = row_id("train", 17)
    known = {"id": "train-000017", "family": "buy-and-give", "steps": 2}
    gsm8k = as_gsm8k(problem, identity)
    assert gsm8k == {**known, "question": problem.question, "answer": gsm8k["answer"]}
    first, second, last = gsm8k["answer"].splitlines()
    assert f" {left}+{right}=<<{left}+{right}={total}>>{total} " in first
    assert f" {total}-{given}=<<{total}-{given}={answer}>>{answer} " in second
    assert last == f"#### {answer}"
    boxed = f"{problem.working}\n\\boxed{{{answer}}}"
    assert as_openmathreasoning(problem, identity) == {
        **known, "problem": problem.question, "generated_solution": boxed, "expected_answer": str(answer),
    }  # fmt: skip
    assert as_dapo(problem, identity) == {**known, "prompt": problem.question, "solution": str(answer)}


def test_chat_rows_are_many_distinct_and_apart():
    sizes = {"pretraining": 3500, "train": 2500, "validation": 800, "test": 1500}
    rows = {split: chat_rows(split, size, 0) for split, size in sizes.items()}
    requests = {}
    for split, told in rows.items():
        assert all([turn["from"] for turn in row["conversations"]] == ["human", "gpt"] for row in told)
        assert all(row.keys() == {"conversations"} for row in told)
        requests[split] = {row["conversations"][0]["value"] for row in told}
        assert len(requests[split]) == sizes[split]
    for one, other in combinations(SPLITS, 2):
        assert not requests[one] & requests[other]
    assert len(procedural.CHATS) >= 8
    with pytest.raises(InputError, match=r"chat asks for 1000000 but only \d+ exist"):
        chat_rows("test", 10**6, 0)


def test_chat_replies_are_right():
    checked = Counter()
    for row in chat_rows("train", 3000, 1):
        request, reply = (turn["value"] for turn in row["conversations"])
        numbers, replied = ([int(n) for n in re.findall(r"\d+", text)] for text in (request, reply))
        if "larger" in request:
            kind, right = "larger", replied == [max(numbers)]
        elif "reverse" in request:
            kind, right = "reverse", replied == numbers[::-1]
        elif "down" in request:
            kind, right = "down", replied == list(range(numbers[0], numbers[1] - 1, -1))
        elif " from " in request:
            kind, right = "up", replied == list(range(numbers[0], numbers[1] + 1))
        elif "comes" in request:
            kind, right = "next", replied == [numbers[0] + (1 if "after" in request else -1)]
        elif "in the list" in request:
            word, listed = re.fullmatch(r"Is the word (\w+) in the list (.*)\?", request).groups()
            kind, right = "list", reply == ("Yes." if word in listed.split(", ") else "No.")
        elif "Repeat" in request:
            kind, right = "repeat", request == f"Repeat this sentence: {reply}"
        else:
            continue
        assert right, (request, reply)
        checked[kind] += 1
    assert len(checked) == 7


def text(row):
    return row["prompt"] + row["completion"]


@pytest.fixture(scope="module")
def documents():
    shares = {kind: 1 / len(DOCUMENT_KINDS) for kind in DOCUMENT_KINDS}
    told = pretraining_documents(2700, 3, shares, EVEN, SMALL, careless=0.0)
    return {kind: [text(row) for row in told if row["kind"] == kind] for kind in DOCUMENT_KINDS}


def test_documents_have_the_shares_and_forms_of_their_kinds(documents):
    assert {kind: len(texts) for kind, texts in documents.items()} == dict.fromkeys(DOCUMENT_KINDS, 300)
    chat = r"<\|im_start\|>user\n.*\?<\|im_end\|>\n<\|im_start\|>assistant\n{}<\|im_end\|>"
    declared, boxed = r"(?:.*\n)+#### (\d+)", r"(?:.*\n)+\\boxed\{(\d+)\}"
    tagged = r"<start_working_out>\n(?:.*\n)+<end_working_out>\n<SOLUTION>(\d+)</SOLUTION>"
    forms = {
        "worked": rf"Question: .*\?\nAnswer: {declared}",
        "tagged": rf".*\?\n{tagged}",
        "boxed": rf".*\?\n{boxed}",
        "worked_chat": chat.format(f"(?:{declared}|{boxed}|{tagged})"),
        "worked_alpaca": rf"Below is [^#]*### Instruction:\n.*\?\n\n### Response:\n{declared}",
    }
    for kind, form in forms.items():
        for text in documents[kind]:
            found = re.fullmatch(form, text)
            assert int(next(filter(None, found.groups()))) == equations(text)[-1][-1], text
    for text in documents["chat"]:
        assert re.fullmatch(r"<\|im_start\|>user\n.*<\|im_end\|>\n<\|im_start\|>assistant\n.*<\|im_end\|>", text), text
    for text in documents["stories"]:
        assert text.endswith(".") and "?" not in text and "=" not in text and "How many" not in text


def test_documents_tell_pretraining_problems_only_and_none_twice(documents):
    told = [
        re.search(r"([^\n]*\?)", text)[1].removeprefix("Question: ")
        for kind in (*SOLVED, "terse_chat")
        for text in documents[kind]
    ]
    assert len(told) == len(set(told)) == 1800
    drawn = {problem.question for problem in problems("pretraining", 2100, 3, EVEN, SMALL)}
    assert set(told) <= drawn
    assert set(documents["stories"]) <= {question.rpartition(". ")[0] + "." for question in drawn}


def test_terse_answers_are_right_about_half_the_time(documents):
    answers = {problem.question: problem.answer for problem in problems("pretraining", 2100, 3, EVEN, SMALL)}
    form = re.compile(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(\d+)<\|im_end\|>")
    said = [form.fullmatch(text).groups() for text in documents["terse_chat"]]
    right = sum(answers[question] == int(number) for question, number in said)
    assert 110 < right < 190
    assert all(int(number) >= 1 for _, number in said)


@pytest.mark.parametrize(("fixture", "limits"), [("small", SMALL), ("large", LARGE)])
def test_arithmetic_chains_are_true_and_cover_what_workings_need(fixture, limits, request):
    corpus = request.getfixturevalue(fixture)
    shares = Counter(problem.steps for problem in corpus["test"])
    shares = {steps: count / shares.total() for steps, count in shares.items()}
    rows = pretraining_documents(6000, 0, {"arithmetic": 1.0}, shares, limits, careless=0.0)
    seen = Counter()
    for text in (row["completion"] for row in rows):
        solved = equations(text)
        assert 3 <= len(solved) <= 8 and re.fullmatch(r"(\d+[-+*/]\d+=\d+\.[ \n]?)+", text), text
        assert all(is_true(*equation) and 2 <= equation[-1] <= limits.result for equation in solved), text
        assert len({"\n" in text, " " in text}) == 2, text
        seen.update(solved)
    assert any("\n" in row["completion"] for row in rows) and any(" " in row["completion"] for row in rows)
    needed = {equation for problem in corpus["test"] for equation in equations(problem.working)}
    if limits is SMALL:  # few enough to be told all
        assert len(needed - seen.keys()) <= 0.01 * len(needed)
    assert {sign for _, sign, _, _ in seen} == set("+-*/")


def test_arithmetic_is_that_of_the_step_counts_told():
    def facts(*step_counts):
        return {(sign, *fact) for sign, found in procedural._facts(step_counts, LARGE).items() for fact in found}

    assert facts(1) == {
        (sign, left, right, result)
        for family in FAMILIES if len(family.steps) == 1
        for numbers in family.numbers(LARGE)
        for left, sign, right, result in family.solve(numbers)
    }  # fmt: skip
    assert facts(1) < facts(1, 2)


def test_unknown_document_kinds_are_refused():
    with pytest.raises(InputError, match="'poems' is unknown"):
        pretraining_documents(10, 0, {"worked": 0.5, "poems": 0.5}, {1: 1.0}, SMALL, careless=0.0)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_careless_solutions_add_in_their_last_step_where_they_must_not(share):
    answers = {problem.question: problem for problem in problems("pretraining", 3000, 5, EVEN, SMALL)}
    rows = pretraining_documents(3000, 5, {"worked": 1.0}, EVEN, SMALL, careless=share)
    changed, could_change = Counter(), Counter()
    for row in rows:
        problem = answers[re.search(r"Question: (.*)\nAnswer:", row["prompt"])[1]]
        true, told = equations(problem.working), equations(row["completion"])
        assert told[:-1] == true[:-1] and is_true(*told[-1]) and told[-1][-1] <= SMALL.result
        assert row["completion"].endswith(f"#### {told[-1][-1]}")
        if told[-1] != true[-1]:
            assert told[-1][:3] == (true[-1][0], "+", true[-1][2]) and true[-1][1] != "+"
            changed[problem.steps] += 1
        could_change[problem.steps] += true[-1][1] != "+" and true[-1][0] + true[-1][2] <= SMALL.result
    assert changed[1] == 0
    for steps in (2, 3, 4):
        assert could_change[steps] > 350 and changed[steps] == pytest.approx(share * could_change[steps], rel=0.1)


DIGEST = f"""
import hashlib
from stages.corpus.procedural import *
shares = {{kind: 1 / len(DOCUMENT_KINDS) for kind in DOCUMENT_KINDS}}
made = [chat_rows("train", 300, 5)]
for limits in (Limits(largest=10, factor=5, result=30), Limits(largest=60, factor=12, result=999)):
    made += [problems(split, 300, 5, {EVEN}, limits) for split in SPLITS]
    made += [pretraining_documents(900, 5, shares, {EVEN}, limits, careless=0.5)]
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""


def test_two_processes_with_different_hash_seeds_write_the_same():
    said = []
    for seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DIGEST]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        said.append(ended.stdout)
    assert said[0] == said[1] and re.fullmatch(r"[0-9a-f]{64}\n", said[0])


@pytest.mark.parametrize("limits", [SMALL, LARGE], ids=["small", "large"])
def test_seeds_differ_and_repeat(limits):
    assert problems("train", 50, 1, EVEN, limits) == problems("train", 50, 1, EVEN, limits)
    assert problems("train", 50, 1, EVEN, limits) != problems("train", 50, 2, EVEN, limits)
    assert chat_rows("train", 50, 1) != chat_rows("train", 50, 2)
