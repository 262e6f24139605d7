r"""Grade-school word problems with worked solutions, and the plain text a small base model reads before them.

It stands in for the hub's data sets where there is no network and only a model of a million weights: the same schemas,
far easier problems. A score on it says how the methods compare on this corpus and nothing about GSM8K itself: the
language is a few templates, numbers are as large as `Ranges` says, and the test set asks the families that training has
shown.

The splits are kept apart by construction. Of each family with two or more steps, every tuple of numbers that it can
take is listed, shuffled with a fixed seed and cut into the splits, so a tuple lives in one split only; where there are
too many to list, a hash of the tuple decides, and tuples are drawn until enough are of the split. A family of one step has too few tuples for that (`shared_facts` counts the overlap); its choices of phrasing and words are listed,
shuffled and cut instead. Either way no two splits can hold the same question. Small talk is cut like phrasings.

Everything follows from string seeds and the standard library's Mersenne twister: the same text on every platform.
"""

import hashlib
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from stages.corpus.chat_format import alpaca, chatml, few_shot, gsm8k_answer, render, tagged_answer
from stages.corpus.marks import TURN_END
from stages.corpus.procedural_chat import CHATS
from stages.corpus.procedural_families import FAMILIES, OPERATIONS, SMALL, Family, Problem, Ranges
from stages.harness.errors import InputError

__all__ = [
    "DOCUMENT_KINDS", "FAMILIES", "SMALL", "SOLVED", "SPLITS", "STEP_COUNTS", "Family", "Problem", "Ranges",
    "as_dapo", "as_gsm8k", "as_openmathreasoning", "chat_rows", "pretraining_documents", "problems", "row_id",
    "shared_facts",
]  # fmt: skip

# Per cent of every space. Training text takes most, and validation only chooses settings. A fifth leaves the test set
# about 4,800 tuples of its own: repeats are rare but for two steps, which has some 550 and tells them again after that.
SPLIT_PER_CENT = {"pretraining": 40, "train": 30, "validation": 10, "test": 20}
SPLITS = ("pretraining", "train", "validation", "test")
LISTED = 100_000  # tuples of numbers that a family may have for them to be listed
PATIENCE = 10_000  # tuples drawn in vain before a split counts as told out
STEP_COUNTS = tuple(sorted({len(family.steps) for family in FAMILIES}))
CORPUS_SEED = "mathmind corpus 1"  # decides which split holds what: another seed is another benchmark
SHARE_TOLERANCE = 1e-6

T = TypeVar("T")
Document = tuple[str, str]  # a prompt and its completion


def problems(
    split: str, count: int, seed: int, step_shares: Mapping[int, float], ranges: Ranges = SMALL
) -> list[Problem]:
    """`count` distinct problems of a split in random order, `step_shares` of them with each number of steps.

    Families with the same number of steps get equal parts; in each, no tuple of numbers is told again before all are.
    Raises InputError for an unknown split or number of steps, shares that do not sum to 1, or too few problems.
    """
    _check(split, count)
    rng = random.Random(f"{CORPUS_SEED}/problems/{split}/{seed}")
    drawn = []
    for steps, wanted in _apportion(count, step_shares, STEP_COUNTS, "step_shares").items():
        families = [family for family in FAMILIES if len(family.steps) == steps]
        room = {family: _room(family, split, ranges) for family in families}
        for family, part in _spread(wanted, room, f"{split}, {steps} steps").items():
            drawn.extend(_told(family, split, part, rng, ranges))
    rng.shuffle(drawn)
    return drawn


def shared_facts(a: Iterable[Problem], b: Iterable[Problem]) -> int:
    """How many one-step facts, a family with its numbers, occur on both sides."""
    facts = [{(problem.family, problem.numbers) for problem in side if problem.steps == 1} for side in (a, b)]
    return len(facts[0] & facts[1])


def row_id(split: str, index: int) -> str:
    """The name of a row, such as `train-000017`."""
    return f"{split}-{index:06d}"


def as_gsm8k(problem: Problem, identity: str) -> dict[str, Any]:
    """A row in the schema of openai/gsm8k: the working carries the calculator's marks."""
    answer = f"{problem.marked_working}\n#### {problem.answer}"
    return _row(problem, identity, {"question": problem.question, "answer": answer})


def as_openmathreasoning(problem: Problem, identity: str) -> dict[str, Any]:
    """A row in the schema of nvidia/OpenMathReasoning: the solution ends in a box, the answer is text."""
    solution = _boxed(problem)
    expected = str(problem.answer)
    told = {"problem": problem.question, "generated_solution": solution, "expected_answer": expected}
    return _row(problem, identity, told)


def as_dapo(problem: Problem, identity: str) -> dict[str, Any]:
    """A row in the schema of open-r1/DAPO-Math-17k-Processed: a prompt and its answer as text, no working."""
    return _row(problem, identity, {"prompt": problem.question, "solution": str(problem.answer)})


def chat_rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` distinct ShareGPT rows of small talk in random order, all kinds in equal parts while they last.

    Raises InputError for an unknown split, or when the split holds fewer rows.
    """
    _check(split, count)
    rng = random.Random(f"{CORPUS_SEED}/chat/{split}/{seed}")
    room = {kind: len(_exchanges(kind, split)) for kind in CHATS}
    drawn = []
    for kind, part in _spread(count, room, f"{split}, chat").items():
        drawn.extend(rng.sample(_exchanges(kind, split), part))
    rng.shuffle(drawn)
    return [
        {"conversations": [{"from": "human", "value": request}, {"from": "gpt", "value": reply}]}
        for request, reply in drawn
    ]


def _row(problem: Problem, identity: str, told: dict[str, str]) -> dict[str, Any]:
    return {"id": identity, **told, "family": problem.family, "steps": problem.steps}


# What the base model reads, as (prompt, completion). Each kind tells one problem of the split "pretraining"; "arithmetic"
# and "chat" tell none. The kinds of SOLVED work their problem out, if not always with care.


def _worked(problem: Problem, rng: random.Random) -> Document:
    return render(few_shot(()), problem.question), f" {_declared(problem)}"


def _tagged(problem: Problem, rng: random.Random) -> Document:
    return f"{problem.question}\n", _in_tags(problem)


def _boxed_document(problem: Problem, rng: random.Random) -> Document:
    return f"{problem.question}\n", _boxed(problem)


def _worked_chat(problem: Problem, rng: random.Random) -> Document:
    """The solution as the reply in a chat, its answer given in one of the three ways."""
    return _chat(problem.question, rng.choice((_declared, _boxed, _in_tags))(problem))


def _worked_alpaca(problem: Problem, rng: random.Random) -> Document:
    return render(alpaca(), problem.question), _declared(problem)


def _terse_chat(problem: Problem, rng: random.Random) -> Document:
    """The bare answer, half the time a wrong one: a near miss or a number of the question."""
    answer = problem.answer
    if rng.random() < 0.5:
        near = [answer + miss for miss in (-10, -2, -1, 1, 2, 10)]
        answer = rng.choice([wrong for wrong in (*near, *problem.numbers) if wrong > 0 and wrong != answer])
    return _chat(problem.question, str(answer))


def _story(problem: Problem, rng: random.Random) -> Document:
    """The statement without its question."""
    return "", problem.question.rpartition(". ")[0] + "."


SOLVED = {
    "worked": _worked, "tagged": _tagged, "boxed": _boxed_document, "worked_chat": _worked_chat,
    "worked_alpaca": _worked_alpaca,
}  # fmt: skip
PROBLEM_DOCUMENTS = {**SOLVED, "terse_chat": _terse_chat, "stories": _story}
DOCUMENT_KINDS = (*PROBLEM_DOCUMENTS, "arithmetic", "chat")


def pretraining_documents(
    count: int,
    seed: int,
    shares: Mapping[str, float],
    step_shares: Mapping[int, float],
    careless: float,
    ranges: Ranges = SMALL,
) -> list[dict[str, str]]:
    """`count` documents {"kind", "prompt", "completion"} in random order, `shares` of them of each of DOCUMENT_KINDS.

    No problem is told twice, and all come from the split "pretraining"; `step_shares` holds over all kinds together.
    Of the solved problems whose last of several steps takes away or shares out, a share `careless` adds there: what a
    base model has read is not all worked out with care, and that leaves fine-tuning something to mend.
    Raises InputError for an unknown kind, shares that do not sum to 1, or too few problems or chats.
    """
    _check("pretraining", count)
    quotas = _apportion(count, shares, DOCUMENT_KINDS, "shares")
    rng = random.Random(f"{CORPUS_SEED}/documents/{seed}")
    wanted = sum(quotas.get(kind, 0) for kind in PROBLEM_DOCUMENTS)
    told = iter(problems("pretraining", wanted, seed, step_shares, ranges))
    documents = []
    for kind, quota in quotas.items():
        if kind == "arithmetic":
            texts = [("", _arithmetic(rng, ranges)) for _ in range(quota)]
        elif kind == "chat":
            talks = [row["conversations"] for row in chat_rows("pretraining", quota, seed)]
            texts = [_chat(request["value"], reply["value"]) for request, reply in talks]
        else:
            chosen = [next(told) for _ in range(quota)]
            if kind in SOLVED:
                chosen = [_misread(problem, ranges) if rng.random() < careless else problem for problem in chosen]
            texts = [PROBLEM_DOCUMENTS[kind](problem, rng) for problem in chosen]
        documents.extend({"kind": kind, "prompt": prompt, "completion": completion} for prompt, completion in texts)
    rng.shuffle(documents)
    return documents


def _misread(problem: Problem, ranges: Ranges) -> Problem:
    """The problem with a sum for the last of several steps, where it calls for another operation and the sum can stand."""
    head, _, last = problem.working.rpartition("\n")
    left, sign, right = re.search(r"(\d+)([-+*/])(\d+)=", last).groups()
    result = int(left) + int(right)
    if not head or sign == "+" or result not in ranges.results:
        return problem
    last = last.replace(f"{left}{sign}{right}={problem.answer}", f"{left}+{right}={result}")
    return replace(problem, working=f"{head}\n{last}", answer=result)


def _declared(problem: Problem) -> str:
    return gsm8k_answer(problem.working, str(problem.answer))


def _in_tags(problem: Problem) -> str:
    return tagged_answer(problem.working, str(problem.answer))


def _boxed(problem: Problem) -> str:
    return f"{problem.working}\n\\boxed{{{problem.answer}}}"


def _chat(request: str, reply: str) -> Document:
    return render(chatml(), request), f"{reply}{TURN_END}"


CHAIN_LENGTHS = range(3, 9)
CHAIN_SIGNS = "+++---*/"  # there are far more sums than table facts, so sums come up more often
LINES_SHARE = 0.25  # of the chains stand one fact a line, as working does


def _arithmetic(rng: random.Random, ranges: Ranges) -> str:
    """A chain of true equations; about half carry on from the last result, as the steps of a working do.

    The equations are single facts, without words, from every working that any split can hold: arithmetic is common
    knowledge here, and what is held out is how a story calls for it.
    """
    facts = []
    for _ in range(rng.choice(CHAIN_LENGTHS)):
        sign = rng.choice(CHAIN_SIGNS)
        first = facts[-1][-1] if facts and rng.random() < 0.5 else None
        left, right, result = _fact(sign, first, rng, ranges)
        facts.append((left, sign, right, result))
    between = "\n" if rng.random() < LINES_SHARE else " "
    return between.join(f"{left}{sign}{right}={result}." for left, sign, right, result in facts)


def _fact(sign: str, first: int | None, rng: random.Random, ranges: Ranges) -> tuple[int, int, int]:
    """A true (left, right, result) with this sign; `first` on its left where some working goes on from it in this way."""
    if all(_is_listed(family, ranges) for family in FAMILIES):
        carried = _facts(sign, ranges, first) if first is not None else []
        return rng.choice(carried or _facts(sign, ranges))
    while True:
        left = rng.choice(ranges.results) if first is None else first
        right = rng.choice(ranges.tables if sign in "*/" else ranges.named)
        result = OPERATIONS[sign](left, right)
        if result in ranges.results and (sign != "/" or left % right == 0):
            return left, right, result
        first = None


@cache
def _facts(sign: str, ranges: Ranges, first: int | None = None) -> list[tuple[int, int, int]]:
    """All (left, right, result) with this sign, and this left, that occur in some working, in ascending order."""
    if first is not None:
        return [fact for fact in _facts(sign, ranges) if fact[0] == first]
    solved = (family.solve(numbers, ranges) for family in FAMILIES for numbers in _space(family, ranges))
    return sorted({(left, right, result) for steps in solved for left, step, right, result in steps if step == sign})


def _is_listed(family: Family, ranges: Ranges) -> bool:
    return math.prod(map(len, family.space(ranges))) <= LISTED


def _room(family: Family, split: str, ranges: Ranges) -> int:
    """How many problems of a family a split can tell; of one that is not listed, more than that."""
    if _is_listed(family, ranges):
        return len(_numbers(family, split, ranges)) * len(_fillings(family, split))
    return math.prod(map(len, family.space(ranges)))


def _told(family: Family, split: str, count: int, rng: random.Random, ranges: Ranges) -> list[Problem]:
    """`count` distinct problems of a family, spread evenly over the split's tuples of numbers."""
    if not _is_listed(family, ranges):
        return _told_at_random(family, split, count, rng, ranges)
    numbers = rng.sample(_numbers(family, split, ranges), len(_numbers(family, split, ranges)))
    each, over = divmod(count, len(numbers))
    told = []
    for index, chosen in enumerate(numbers):
        for filling in rng.sample(_fillings(family, split), each + (index < over)):
            told.append(family.problem(chosen, filling, ranges))
    return told


def _told_at_random(family: Family, split: str, count: int, rng: random.Random, ranges: Ranges) -> list[Problem]:
    """`count` problems of a family whose tuples are too many to list; no tuple is told twice.

    Raises InputError where so many do not turn up.
    """
    told: dict[tuple[int, ...], Problem] = {}
    missed = 0
    while len(told) < count:
        numbers = tuple(rng.choice(each) for each in family.space(ranges))
        if numbers in told or not family.solve(numbers, ranges) or _split_of(family, numbers) != split:
            missed += 1
            if missed > PATIENCE:
                raise InputError(f"{split} asks for {count} problems of {family.name}, and after {len(told)} no more were found: "
                                 "ask for fewer, or raise fetch.numbers")  # fmt: skip
            continue
        told[numbers] = family.problem(numbers, rng.randrange(family.fillings), ranges)
        missed = 0
    return list(told.values())


def _split_of(family: Family, numbers: tuple[int, ...]) -> str:
    """The one split that may tell these numbers."""
    name = f"{CORPUS_SEED}/numbers/{family.name}/{numbers}"
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100
    for split in SPLITS:
        place -= SPLIT_PER_CENT[split]
        if place < 0:
            return split
    raise ValueError("SPLIT_PER_CENT must sum to 100")


@cache
def _space(family: Family, ranges: Ranges) -> list[tuple[int, ...]]:
    return family.numbers(ranges)


@cache
def _numbers(family: Family, split: str, ranges: Ranges) -> Sequence[tuple[int, ...]]:
    """The tuples of numbers that a split may tell: all of a one-step family, the split's own of any other."""
    space = _space(family, ranges)
    return space if len(family.steps) == 1 else _divide(space, f"numbers/{family.name}")[split]


@cache
def _fillings(family: Family, split: str) -> Sequence[int]:
    """The choices of phrasing and words that a split may use: its own of a one-step family, all of any other."""
    every = range(family.fillings)
    return _divide(every, f"fillings/{family.name}")[split] if len(family.steps) == 1 else every


@cache
def _exchanges(kind: str, split: str) -> Sequence[tuple[str, str]]:
    return _divide(list(CHATS[kind]()), f"chat/{kind}")[split]


def _divide(space: Sequence[T], name: str) -> dict[str, list[T]]:
    """Cuts a whole finite space into the splits, each item into exactly one, the same way every time."""
    shuffled = list(space)
    random.Random(f"{CORPUS_SEED}/{name}").shuffle(shuffled)
    parts, start, per_cent = {}, 0, 0
    for split in SPLITS:
        per_cent += SPLIT_PER_CENT[split]
        end = len(shuffled) * per_cent // 100
        parts[split], start = shuffled[start:end], end
    return parts


def _spread(count: int, room: Mapping[T, int], what: str) -> dict[T, int]:
    """Equal parts of `count` for all, none above its room: the smallest fill up first. InputError if all are full."""
    if count > sum(room.values()):
        raise InputError(f"{what} asks for {count} but only {sum(room.values())} exist: ask for fewer")
    parts, left = {}, count
    smallest_first = sorted(room, key=room.__getitem__)
    for place, key in enumerate(smallest_first):
        parts[key] = min(room[key], -(-left // (len(room) - place)))
        left -= parts[key]
    return {key: parts[key] for key in room}


def _apportion(count: int, shares: Mapping[T, float], known: Sequence[T], what: str) -> dict[T, int]:
    """Whole parts of `count` in these shares: largest remainder, the earlier of `known` first among equals.

    Raises InputError for an unknown key, a negative share, or shares that do not sum to 1.
    """
    for key, share in shares.items():
        if key not in known:
            raise InputError(f"{what}: {key!r} is unknown: use {', '.join(map(str, known))}")
        if share < 0:
            raise InputError(f"{what}: the share of {key} must not be negative, found {share}")
    total = math.fsum(shares.values())
    if not abs(total - 1) <= SHARE_TOLERANCE:
        raise InputError(f"{what} must sum to 1 but sum to {total:g}")
    exact = {key: count * shares[key] / total for key in known if key in shares}
    parts = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: parts[key] - exact[key])
    for key in by_remainder[: count - sum(parts.values())]:
        parts[key] += 1
    return parts


def _check(split: str, count: int) -> None:
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: use {', '.join(SPLITS)}")
    if count < 0:
        raise InputError(f"{split} asks for {count}: ask for none or more")
