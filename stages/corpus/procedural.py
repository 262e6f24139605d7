r"""Grade-school word problems with worked solutions, and the plain text a small base model reads before them.

It stands in for the hub's data sets where there is no network and only a model of some million weights: the same
schemas, far easier problems. A score on it says how the methods compare on this corpus and nothing about GSM8K itself:
the language is a few templates, and the test set asks the families that training has shown. How large the numbers are,
Limits says; how many steps a problem takes, `step_shares`.

The splits are kept apart by construction: a family's tuple of numbers lives in one split only. Where the ranges of its
numbers have at most LISTED combinations, every tuple that the family can take is listed, shuffled with a fixed seed and
cut into the splits. Where they have more, tuples are drawn, and a hash of each says which split it belongs to. A family
of one step that has fewer than TO_CUT tuples has too few for that (`shared_facts` counts the overlap); its choices of
phrasing and words are listed, shuffled and cut instead. Either way no two splits can hold the same question. Small talk
is cut like phrasings.

Everything follows from string seeds and the standard library's Mersenne twister: the same text on every platform.
"""

import hashlib
import math
import random
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain
from typing import Any, TypeVar

from stages.corpus.chat_format import alpaca, chatml, few_shot, gsm8k_answer, render, tagged_answer
from stages.corpus.marks import TURN_END
from stages.corpus.procedural_chat import CHATS
from stages.corpus.procedural_families import FAMILIES, Family, Limits, Problem
from stages.harness.errors import InputError

__all__ = [
    "DOCUMENT_KINDS", "FAMILIES", "SOLVED", "SPLITS", "STEP_COUNTS", "Family", "Limits", "Problem",
    "as_dapo", "as_gsm8k", "as_openmathreasoning", "chat_rows", "pretraining_documents", "problems", "row_id",
    "shared_facts",
]  # fmt: skip

# Per cent of every space. Training text takes most, and validation only chooses settings. With numbers up to 10 a fifth
# leaves the test set about 4,800 tuples of up to four steps: repeats are rare but for two, which has some 550.
SPLIT_PER_CENT = {"pretraining": 40, "train": 30, "validation": 10, "test": 20}
SPLIT_ENDS = tuple(accumulate(SPLIT_PER_CENT.values()))
SPLITS = ("pretraining", "train", "validation", "test")
STEP_COUNTS = tuple(sorted({len(family.steps) for family in FAMILIES}))
CORPUS_SEED = "mathmind corpus 1"  # decides which split holds what: another seed is another benchmark
LISTED = 100_000  # combinations of numbers, half a second's work; in a larger space no tuple needs to be told twice
TO_CUT = 100  # tuples of one step: of the 81 sums of numbers up to 10, the test set would hold 17
MISSES = 100_000  # in a row, after which a space is taken to hold no more: half a second's work
SHARE_TOLERANCE = 1e-6

T = TypeVar("T")
Document = tuple[str, str]  # a prompt and its completion


def problems(split: str, count: int, seed: int, step_shares: Mapping[int, float], limits: Limits) -> list[Problem]:
    """`count` distinct problems of a split in random order, `step_shares` of them with each number of steps.

    Families with the same number of steps get equal parts; in each, no tuple of numbers is told again before all are,
    and none that is drawn is told again. Raises InputError for an unknown split or number of steps, shares that do not
    sum to 1, limits that leave a family no numbers, or too few problems.
    """
    _check(split, count)
    rng = random.Random(f"{CORPUS_SEED}/problems/{split}/{seed}")
    drawn = []
    for steps, wanted in _apportion(count, step_shares, STEP_COUNTS, "step_shares").items():
        families = [family for family in FAMILIES if len(family.steps) == steps]
        room = {family: _room(family, split, limits) for family in families}
        for family, part in _spread(wanted, room, f"{split}, {steps} steps").items():
            drawn.extend(_told(family, split, part, limits, rng))
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
    limits: Limits,
    careless: float,
) -> list[dict[str, str]]:
    """`count` documents {"kind", "prompt", "completion"} in random order, `shares` of them of each of DOCUMENT_KINDS.

    No problem is told twice, and all come from the split "pretraining"; `step_shares` holds over all kinds together.
    Of the solved problems whose last of several steps takes away or shares out, a share `careless` adds there: what a
    base model has read is not all worked out with care, and that leaves fine-tuning something to mend.
    Raises InputError for an unknown kind, shares that do not sum to 1, limits that leave a family no numbers, or too
    few problems or chats.
    """
    _check("pretraining", count)
    quotas = _apportion(count, shares, DOCUMENT_KINDS, "shares")
    rng = random.Random(f"{CORPUS_SEED}/documents/{seed}")
    problem_count = sum(quotas.get(kind, 0) for kind in PROBLEM_DOCUMENTS)
    told = iter(problems("pretraining", problem_count, seed, step_shares, limits))
    documents = []
    for kind, quota in quotas.items():
        if kind == "arithmetic":
            facts = _facts(tuple(steps for steps, share in step_shares.items() if share), limits)
            texts = [("", _arithmetic(facts, rng)) for _ in range(quota)]
        elif kind == "chat":
            talks = [row["conversations"] for row in chat_rows("pretraining", quota, seed)]
            texts = [_chat(request["value"], reply["value"]) for request, reply in talks]
        else:
            chosen = [next(told) for _ in range(quota)]
            if kind in SOLVED:
                chosen = [_misread(problem, limits) if rng.random() < careless else problem for problem in chosen]
            texts = [PROBLEM_DOCUMENTS[kind](problem, rng) for problem in chosen]
        documents.extend({"kind": kind, "prompt": prompt, "completion": completion} for prompt, completion in texts)
    rng.shuffle(documents)
    return documents


def _misread(problem: Problem, limits: Limits) -> Problem:
    """The problem with a sum for the last of several steps, where it calls for another operation and the sum can stand."""
    head, _, last = problem.working.rpartition("\n")
    left, sign, right = re.search(r"(\d+)([-+*/])(\d+)=", last).groups()
    result = int(left) + int(right)
    if not head or sign == "+" or result > limits.result:
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
FACT_TUPLES = 2_000  # of a family whose numbers are drawn: up to 60 they hold 57,000 facts, as many as 10,000 chains

Fact = tuple[int, int, int]  # left, right, result


def _arithmetic(facts: Mapping[str, Sequence[Fact]], rng: random.Random) -> str:
    """A chain of true equations; about half carry on from the last result, as the steps of a working do."""
    told = []
    for _ in range(rng.choice(CHAIN_LENGTHS)):
        sign = rng.choice(CHAIN_SIGNS)
        carried = _starting(told[-1][-1], facts[sign]) if told and rng.random() < 0.5 else []
        left, right, result = rng.choice(carried or facts[sign])
        told.append((left, sign, right, result))
    between = "\n" if rng.random() < LINES_SHARE else " "
    return between.join(f"{left}{sign}{right}={result}." for left, sign, right, result in told)


def _starting(left: int, facts: Sequence[Fact]) -> Sequence[Fact]:
    """Those of the facts, which are in ascending order, that have this left."""
    return facts[bisect(facts, (left,)) : bisect(facts, (left + 1,))]


@cache
def _facts(step_counts: tuple[int, ...], limits: Limits) -> dict[str, list[Fact]]:
    """By sign, the facts in workings of so many steps, each once, in ascending order.

    They are single facts, without words, from every working that any split can hold: arithmetic is common knowledge
    here, and what is held out is how a story calls for it. Of a family whose numbers are drawn, they are from the
    workings of FACT_TUPLES tuples of the split "pretraining".
    """
    facts = {sign: set() for sign in CHAIN_SIGNS}
    for family in FAMILIES:
        if len(family.steps) in step_counts:
            rng = random.Random(f"{CORPUS_SEED}/facts/{family.name}")
            listed = _is_listed(family, limits)
            tuples = _space(family, limits) if listed else _drawn(family, "pretraining", FACT_TUPLES, limits, rng)
            for left, sign, right, result in chain.from_iterable(map(family.solve, tuples)):
                facts[sign].add((left, right, result))
    return {sign: sorted(found) for sign, found in facts.items()}


def _told(family: Family, split: str, count: int, limits: Limits, rng: random.Random) -> list[Problem]:
    """`count` distinct problems of a family, spread evenly over the split's tuples of numbers, or each of its own."""
    if not _is_listed(family, limits):
        numbers = _drawn(family, split, count, limits, rng)
        return [family.problem(chosen, rng.randrange(family.fillings)) for chosen in numbers]
    numbers = rng.sample(_numbers(family, split, limits), len(_numbers(family, split, limits)))
    each, over = divmod(count, len(numbers))
    told = []
    for index, chosen in enumerate(numbers):
        for filling in rng.sample(_fillings(family, split, limits), each + (index < over)):
            told.append(family.problem(chosen, filling))
    return told


def _room(family: Family, split: str, limits: Limits) -> int:
    """How many problems of a family a split can tell; where its numbers are drawn, a bound that it stays below."""
    if not _is_listed(family, limits):
        return _combinations(family, limits)
    return len(_numbers(family, split, limits)) * len(_fillings(family, split, limits))


def _combinations(family: Family, limits: Limits) -> int:
    return math.prod(map(len, family.ranges(limits)))


def _is_listed(family: Family, limits: Limits) -> bool:
    return _combinations(family, limits) <= LISTED


@cache
def _space(family: Family, limits: Limits) -> list[tuple[int, ...]]:
    return family.numbers(limits)


def _cuts_words(family: Family, limits: Limits) -> bool:
    """Whether the phrasings and words of a listed family are divided among the splits, and not its numbers."""
    return len(family.steps) == 1 and len(_space(family, limits)) < TO_CUT


@cache
def _numbers(family: Family, split: str, limits: Limits) -> Sequence[tuple[int, ...]]:
    """The listed tuples of numbers that a split may tell. InputError where there are none."""
    space = _space(family, limits)
    numbers = space if _cuts_words(family, limits) else _divide(space, f"numbers/{family.name}")[split]
    if not numbers:
        raise InputError(f"fetch.numbers leaves the family {family.name} nothing to tell in {split}: raise its limits")
    return numbers


@cache
def _fillings(family: Family, split: str, limits: Limits) -> Sequence[int]:
    """The choices of phrasing and words that a split may use of a listed family: all, or its own where they are cut."""
    every = range(family.fillings)
    return _divide(every, f"fillings/{family.name}")[split] if _cuts_words(family, limits) else every


def _drawn(family: Family, split: str, count: int, limits: Limits, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """`count` distinct tuples of a space too large to list, in random order. InputError where no more are found."""
    ranges, drawn, misses = family.ranges(limits), set(), 0
    while len(drawn) < count:
        numbers = tuple(map(rng.choice, ranges))
        if numbers not in drawn and family.fits(numbers, limits) and _split_of(family, numbers) == split:
            drawn.add(numbers)
            misses = 0
            yield numbers
        elif (misses := misses + 1) == MISSES:
            raise InputError(f"fetch.numbers: only {len(drawn)} of {count} tuples of numbers were found for the family "
                             f"{family.name} in {split}: ask for fewer problems, or raise its limits")  # fmt: skip


def _split_of(family: Family, numbers: tuple[int, ...]) -> str:
    """The split of a tuple of numbers that is drawn: the same under any limits."""
    digest = hashlib.sha256(f"{CORPUS_SEED}/numbers/{family.name}/{numbers}".encode()).digest()
    return SPLITS[bisect(SPLIT_ENDS, int.from_bytes(digest[:8]) % 100)]


@cache
def _exchanges(kind: str, split: str) -> Sequence[tuple[str, str]]:
    return _divide(list(CHATS[kind]()), f"chat/{kind}")[split]


def _divide(space: Sequence[T], name: str) -> dict[str, list[T]]:
    """Cuts a whole finite space into the splits, each item into exactly one, the same way every time."""
    shuffled = list(space)
    random.Random(f"{CORPUS_SEED}/{name}").shuffle(shuffled)
    ends = [len(shuffled) * per_cent // 100 for per_cent in SPLIT_ENDS]
    return {split: shuffled[start:end] for split, start, end in zip(SPLITS, [0, *ends], ends)}


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
