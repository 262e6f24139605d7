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
    as_dapo,
    as_gsm8k,
    as_openmathreasoning,
    chat_rows,
    pretraining_documents,
    problems,
    row_id,
    shared_facts,
)
from stages.corpus.procedural_families import SMALL, Family, Ranges
from stages.harness.errors import InputError

ROOT = Path(__file__).parents[2]
EVEN = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}
REALISTIC = {"pretraining": 8000, "train": 4000, "validation": 500, "test": 1500}
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def corpus():
    return {split: problems(split, size, 7, {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2}) for split, size in REALISTIC.items()}


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
                in_words = operand == 2 and ("twice" in problem.question or problem.family == "there-and-back")
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
    }
    checked = Counter()
    for problem in everything:
        if problem.family in by_hand:
            assert by_hand[problem.family](*problem.numbers) == problem.answer, problem
            checked[problem.family] += 1
    assert checked.keys() == by_hand.keys()


def test_questions_tell_exactly_the_numbers_of_the_tuple(everything):
    for problem in everything:
        told = sorted(map(int, re.findall(r"\d+", problem.question)))
        assert told == sorted(problem.numbers), problem
        assert problem.question.endswith("?") and problem.question.count("?") == 1
        assert not set("{}") & set(problem.question + problem.working), problem


def test_numbers_and_results_stay_small(everything):
    for problem in everything:
        assert all(2 <= number <= 10 for number in problem.numbers)
        for left, sign, right, result in equations(problem.working):
            assert 1 <= result <= 99
            assert sign != "*" or min(left, right) <= 5
            assert sign != "/" or right <= 5


def test_families_cover_one_to_four_steps():
    counts = Counter(len(family.steps) for family in FAMILIES)
    assert set(counts) == {1, 2, 3, 4}
    assert counts[1] >= 3 and min(counts[2], counts[3], counts[4]) >= 3 and counts.total() >= 12
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_all_families_are_told_in_all_phrasings(corpus):
    told = {problem.question for problem in corpus["pretraining"]}
    for family in FAMILIES:
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


def test_the_splits_cut_every_space_whole():
    for family in FAMILIES:
        longer = len(family.steps) > 1
        whole = family.numbers() if longer else range(family.fillings)
        parts = [list(procedural._numbers(family, split, SMALL) if longer else procedural._fillings(family, split)) for split in SPLITS]
        assert sorted(sum(parts, [])) == list(whole), family.name
        assert all(parts), family.name


def test_numbers_repeat_only_when_the_split_has_no_more():
    told = problems("test", 900, 0, {3: 0.5, 4: 0.5})
    uses = Counter((problem.family, problem.numbers) for problem in told)
    for family in FAMILIES:
        counts = [count for (name, _), count in uses.items() if name == family.name]
        assert not counts or max(counts) == 1 or len(counts) == len(procedural._numbers(family, "test", SMALL))


def test_one_step_facts_are_shared_and_counted(corpus):
    one_step = [{(p.family, p.numbers) for p in corpus[split] if p.steps == 1} for split in ("train", "test")]
    assert shared_facts(corpus["train"], corpus["test"]) == len(one_step[0] & one_step[1]) > 50
    longer = [problem for problem in corpus["train"] if problem.steps > 1]
    assert shared_facts(longer, longer) == 0


def test_step_shares_are_met_with_largest_remainders():
    def steps(count, shares):
        return Counter(problem.steps for problem in problems("train", count, 0, shares))

    assert steps(200, {1: 0.45, 2: 0.4, 3: 0.15}) == {1: 90, 2: 80, 3: 30}
    assert steps(10, {1: 0.26, 2: 0.26, 3: 0.48}) == {1: 3, 2: 2, 3: 5}
    assert steps(3, {4: 0.0, 2: 1.0}) == {2: 3}
    families = Counter(problem.family for problem in problems("train", 700, 0, {2: 1.0}))
    assert max(families.values()) - min(families.values()) <= 1


@pytest.mark.parametrize(
    ("split", "count", "shares", "says"),
    [
        ("train", 10, {1: 0.5, 2: 0.4}, "must sum to 1 but sum to 0.9"),
        ("train", 10, {1: 0.5, 9: 0.5}, "9 is unknown: use 1, 2, 3, 4"),
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
        problems(split, count, 0, shares)


def test_a_whole_space_can_be_drawn_and_holds_no_duplicate(monkeypatch):
    tiny = Family("tiny", ("a+b",), "ab", ("{name} has {a}. {He} gets {b}. How many in all?",), ("{equation}.",))
    monkeypatch.setattr(procedural, "FAMILIES", (tiny,))
    room = 16 * len(procedural._fillings(tiny, "train"))
    drawn = problems("train", room, 0, {1: 1.0})
    assert len({problem.question for problem in drawn}) == room
    with pytest.raises(InputError, match=f"asks for {room + 1} but only {room} exist"):
        problems("train", room + 1, 0, {1: 1.0})


def test_a_family_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="tell all numbers"):
        Family("bad", ("a+b",), "", ("{name} has {a}. How many?",), ("{equation}",))
    with pytest.raises(ValueError, match="same words"):
        Family("bad", ("a+b",), "", ("{name} {a} {b}. Is it?", "{things} {a} {b}. Is it?"), ("{equation}",))
    with pytest.raises(ValueError, match="one line"):
        Family("bad", ("a+b",), "", ("{name} {a} {b}. Is it?",), ())


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
    told = pretraining_documents(2700, 3, shares, EVEN, careless=0.0)
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
    drawn = {problem.question for problem in problems("pretraining", 2100, 3, EVEN)}
    assert set(told) <= drawn
    assert set(documents["stories"]) <= {question.rpartition(". ")[0] + "." for question in drawn}


def test_terse_answers_are_right_about_half_the_time(documents):
    answers = {problem.question: problem.answer for problem in problems("pretraining", 2100, 3, EVEN)}
    form = re.compile(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(\d+)<\|im_end\|>")
    said = [form.fullmatch(text).groups() for text in documents["terse_chat"]]
    right = sum(answers[question] == int(number) for question, number in said)
    assert 110 < right < 190
    assert all(int(number) >= 1 for _, number in said)


def test_arithmetic_chains_are_true_and_cover_what_workings_need(corpus):
    texts = [row["completion"] for row in pretraining_documents(6000, 0, {"arithmetic": 1.0}, {1: 1.0}, careless=0.0)]
    seen = Counter()
    for text in texts:
        solved = equations(text)
        assert 3 <= len(solved) <= 8 and re.fullmatch(r"(\d+[-+*/]\d+=\d+\.[ \n]?)+", text), text
        assert all(is_true(*equation) for equation in solved), text
        seen.update(solved)
    assert any("\n" in text for text in texts) and any("\n" not in text for text in texts)
    needed = {equation for problem in corpus["test"] for equation in equations(problem.working)}
    assert len(needed - seen.keys()) <= 0.01 * len(needed)
    assert {sign for _, sign, _, _ in seen} == set("+-*/")


def test_unknown_document_kinds_are_refused():
    with pytest.raises(InputError, match="'poems' is unknown"):
        pretraining_documents(10, 0, {"worked": 0.5, "poems": 0.5}, {1: 1.0}, careless=0.0)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_careless_solutions_add_in_their_last_step_where_they_must_not(share):
    answers = {problem.question: problem for problem in problems("pretraining", 3000, 5, EVEN)}
    rows = pretraining_documents(3000, 5, {"worked": 1.0}, EVEN, careless=share)
    changed, could_change = Counter(), Counter()
    for row in rows:
        problem = answers[re.search(r"Question: (.*)\nAnswer:", row["prompt"])[1]]
        true, told = equations(problem.working), equations(row["completion"])
        assert told[:-1] == true[:-1] and is_true(*told[-1]) and told[-1][-1] in SMALL.results
        assert row["completion"].endswith(f"#### {told[-1][-1]}")
        if told[-1] != true[-1]:
            assert told[-1][:3] == (true[-1][0], "+", true[-1][2]) and true[-1][1] != "+"
            changed[problem.steps] += 1
        could_change[problem.steps] += true[-1][1] != "+" and true[-1][0] + true[-1][2] in SMALL.results
    assert changed[1] == 0
    for steps in (2, 3, 4):
        assert could_change[steps] > 350 and changed[steps] == pytest.approx(share * could_change[steps], rel=0.1)


DIGEST = f"""
import hashlib
from stages.corpus.procedural import *
shares = {{kind: 1 / len(DOCUMENT_KINDS) for kind in DOCUMENT_KINDS}}
made = [problems(split, 300, 5, {EVEN}) for split in SPLITS]
made += [chat_rows("train", 300, 5), pretraining_documents(900, 5, shares, {EVEN}, careless=0.5)]
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


def test_seeds_differ_and_repeat():
    assert problems("train", 50, 1, EVEN) == problems("train", 50, 1, EVEN)
    assert problems("train", 50, 1, EVEN) != problems("train", 50, 2, EVEN)
    assert chat_rows("train", 50, 1) != chat_rows("train", 50, 2)


LARGE = Ranges(largest=60, factor=12, result=999)
LONGER = {2: 0.3, 3: 0.4, 4: 0.3}


@pytest.fixture(scope="module")
def large():
    return {split: problems(split, 1500, 7, LONGER, LARGE) for split in SPLITS}


def test_large_numbers_make_true_workings_within_their_ranges(large):
    for told in large.values():
        assert len({problem.question for problem in told}) == len(told)
        for problem in told:
            found = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem.working)
            assert len(found) == problem.steps and found[-1][-1] == str(problem.answer)
            assert all(is_true(int(a), sign, int(b), int(c)) and int(c) in LARGE.results for a, sign, b, c in found)
            assert set(problem.numbers) <= set(LARGE.named)
    assert max(problem.answer for problem in large["test"]) > 500 and {problem.steps for problem in large["test"]} == {2, 3, 4}


def test_no_two_splits_tell_the_same_large_numbers_in_a_family(large):
    numbers = [{(problem.family, problem.numbers) for problem in large[split]} for split in SPLITS]
    assert sum(map(len, numbers)) == len(set().union(*numbers))


def test_large_numbers_come_again_with_the_seed():
    first, again, other = (problems("test", 200, seed, LONGER, LARGE) for seed in (1, 1, 2))
    assert first == again != other


def test_a_space_too_large_to_list_says_when_it_is_told_out():
    wide = Ranges(largest=150, factor=5, result=30)  # few of its 3 million tuples stay below 30
    with pytest.raises(InputError, match="no more were found: ask for fewer, or raise fetch.numbers"):
        problems("test", 40_000, 0, {3: 1.0}, wide)


def test_documents_with_large_numbers_tell_no_problem_of_the_other_splits(large):
    rows = pretraining_documents(2000, 3, {"worked": 0.7, "arithmetic": 0.3}, LONGER, careless=0.3, ranges=LARGE)
    read = {row["prompt"] for row in rows}
    assert not any(any(problem.question in prompt for prompt in read) for split in ("train", "test") for problem in large[split][:100])
    sums = [fact for row in rows if row["kind"] == "arithmetic" for fact in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", row["completion"])]
    assert len(sums) > 2000 and all(is_true(int(a), sign, int(b), int(c)) and int(c) in LARGE.results for a, sign, b, c in sums)
