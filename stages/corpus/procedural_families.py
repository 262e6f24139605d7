"""The families of word problems: what is told, what is worked out, and which numbers and words fit.

A family is one entry in FAMILIES. To add one, write its steps (`r1` is the result of the first step), its phrasings and
one line of working a step; the numbers it can take follow from the steps and from Limits. The vocabulary is small on
purpose: a model of a million weights has to learn it, and a tokenizer of some 480 tokens has to hold it.
"""

import itertools
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

from pydantic import Field, model_validator

from stages.harness.params import StageParams

SMALLEST = 2  # of all numbers and results, so that nouns stay plural

NAMES = tuple("Tom Ben Sam Max Leo Dan Jack Adam Ann Mia Eva Zoe Lily Emma Kate Rosa".split())
MEN = frozenset(NAMES[:8])
THINGS = tuple(
    "apples balls beads books bricks buttons cakes cards coins cups eggs flowers "
    "hats keys nuts pears pens plums rings shells stamps stones toys kites".split()
)  # each is its singular and an s
BOXES = tuple("bags boxes baskets jars trays packs".split())
PLACES = tuple("park school farm lake shop beach library garden".split())

WORDS = {"name": NAMES, "things": THINGS, "boxes": BOXES, "place": PLACES}
SECOND_WORDS = {"friend": "name", "others": "things", "next_place": "place"}  # from the same list, never the same word
SLOTS = (*WORDS, *SECOND_WORDS)  # `he` and `He` follow from `name`

EQUATION = re.compile(r"(\w+)([-+*/])(\w+)")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


class Limits(StageParams):
    """The largest numbers that a problem may hold; the smallest is SMALLEST."""

    largest: int = Field(ge=SMALLEST)  # that a question may name
    factor: int = Field(ge=SMALLEST)  # of one factor of every product, and of every divisor
    result: int = Field(ge=SMALLEST)  # of every step

    @model_validator(mode="after")
    def _factors_are_named(self) -> "Limits":
        if self.factor > self.largest:
            raise ValueError("factor must not be above largest, as a question names it")
        return self


@dataclass(frozen=True)
class Problem:
    """A word problem with its working: plain, and with GSM8K's calculator marks."""

    family: str
    steps: int
    numbers: tuple[int, ...]
    question: str
    working: str
    marked_working: str
    answer: int


@dataclass(frozen=True)
class Family:
    """One way of telling a problem: `factors` holds the letters that are limited to Limits.factor.

    Raises ValueError when the entry contradicts itself: it is the programmer's to mend, and shows at import.
    """

    name: str
    steps: tuple[str, ...]
    factors: str
    phrasings: tuple[str, ...]
    working: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.working):
            raise ValueError(f"{self.name}: one line of working a step is needed")
        for left, sign, right in self.equations:
            if sign in "*/" and not {right, left if sign == "*" else right} & {*self.factors, "2"}:
                raise ValueError(f"{self.name}: {left}{sign}{right} needs a divisor, or one factor, that is in factors")
        for phrasing in self.phrasings:
            statement, _, question = phrasing.rpartition(". ")
            if not question.endswith("?") or _fields(statement) & set("abcdef") != set(self.letters):
                raise ValueError(f"{self.name}: tell all numbers, then ask in one last sentence: {phrasing}")
            if _fields(phrasing) & set(SLOTS) != set(self.slots):
                raise ValueError(f"{self.name}: all phrasings must use the same words: {phrasing}")

    @cached_property
    def equations(self) -> tuple[tuple[str, str, str], ...]:
        """The steps as (left, operator, right)."""
        return tuple(EQUATION.fullmatch(step).groups() for step in self.steps)

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """The names of the numbers, in order."""
        operands = {operand for left, _, right in self.equations for operand in (left, right)}
        return tuple(letter for letter in "abcdef" if letter in operands)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The words that the phrasings leave open, first words before second ones."""
        used = _fields(self.phrasings[0])
        return tuple(slot for slot in SLOTS if slot in used)

    @cached_property
    def fillings(self) -> int:
        """How many choices of phrasing and words there are."""
        return len(self.phrasings) * math.prod(
            len(WORDS[slot]) if slot in WORDS else len(WORDS[SECOND_WORDS[slot]]) - 1 for slot in self.slots
        )

    def ranges(self, limits: Limits) -> list[range]:
        """What each number may be, in the order of `letters`, before steps are worked out."""
        largest = (limits.factor if letter in self.factors else limits.largest for letter in self.letters)
        return [range(SMALLEST, number + 1) for number in largest]

    def numbers(self, limits: Limits) -> list[tuple[int, ...]]:
        """Every tuple of numbers that this family can take, in ascending order."""
        return [numbers for numbers in itertools.product(*self.ranges(limits)) if self.fits(numbers, limits)]

    def fits(self, numbers: Sequence[int], limits: Limits) -> bool:
        """Whether every step divides exactly and results in SMALLEST..limits.result."""
        solved = self.solve(numbers)
        return solved is not None and all(SMALLEST <= result <= limits.result for *_, result in solved)

    def solve(self, numbers: Sequence[int]) -> list[tuple[int, str, int, int]] | None:
        """The steps as (left, operator, right, result); None where one does not divide exactly."""
        values = {"2": 2, **dict(zip(self.letters, numbers, strict=True))}  # 2 is told in words: twice, half
        solved = []
        for count, (left, sign, right) in enumerate(self.equations, 1):
            first, second = values[left], values[right]
            if sign == "/" and first % second:
                return None
            result = values[f"r{count}"] = OPERATIONS[sign](first, second)
            solved.append((first, sign, second, result))
        return solved

    def problem(self, numbers: tuple[int, ...], filling: int) -> Problem:
        """Tells numbers that fit with a choice of phrasing and words in 0..fillings-1."""
        filling, phrasing = divmod(filling, len(self.phrasings))
        words: dict[str, str | int] = dict(zip(self.letters, numbers, strict=True))
        places = {}
        for slot in self.slots:
            if slot in WORDS:
                filling, places[slot] = divmod(filling, len(WORDS[slot]))
                words[slot] = WORDS[slot][places[slot]]
            else:
                first = SECOND_WORDS[slot]
                filling, further = divmod(filling, len(WORDS[first]) - 1)
                words[slot] = WORDS[first][(places[first] + 1 + further) % len(WORDS[first])]
        words["he"] = "he" if words["name"] in MEN else "she"
        words["He"] = words["he"].capitalize()
        plain, marked = [], []
        for line, (left, sign, right, result) in zip(self.working, self.solve(numbers), strict=True):
            sum_ = f"{left}{sign}{right}="
            plain.append(line.format_map({**words, "equation": f"{sum_}{result}"}))
            marked.append(line.format_map({**words, "equation": f"{sum_}<<{sum_}{result}>>{result}"}))
        question = self.phrasings[phrasing].format_map(words)
        return Problem(self.name, len(self.steps), numbers, question, "\n".join(plain), "\n".join(marked), result)


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(template) if field}


# Unformatted, so that an entry's first line holds its name, steps and factors. A long phrasing goes on in a new line.
# fmt: off
# ruff: noqa: ISC004
ONE_STEP = (
    Family(
        "buy-more", ("a+b",), "",
        (
            "{name} has {a} {things}. {He} buys {b} more. How many {things} does {name} have now?",
            "{name} finds {a} {things}. Then {he} finds {b} more. How many {things} does {name} find in all?",
            "There are {a} {things} in the room. {name} brings {b} more. How many {things} are there now?",
        ),
        ("Then {equation} {things}.",),
    ),
    Family(
        "give-away", ("a-b",), "",
        (
            "{name} has {a} {things}. {He} gives {b} away. How many {things} does {name} have now?",
            "{name} has {a} {things}. {He} loses {b} of them. How many {things} are left?",
            "There are {a} {things} in the room. {name} takes {b} of them. How many {things} are left?",
        ),
        ("Then {equation} {things}.",),
    ),
    Family(
        "groups-of", ("a*b",), "a",
        (
            "{name} has {a} {boxes}. There are {b} {things} in each. How many {things} does {name} have?",
            "{name} fills {a} {boxes}. {He} puts {b} {things} in each. How many {things} are there in all?",
            "There are {a} {boxes} with {b} {things} in each. {name} takes them all. "
            "How many {things} does {name} take?",
        ),
        ("In all {equation} {things}.",),
    ),
    Family(
        "share-equally", ("a/b",), "b",
        (
            "{name} has {a} {things}. {He} shares them equally among {b} friends. "
            "How many {things} does each friend get?",
            "{name} puts {a} {things} equally into {b} boxes. How many {things} are in each?",
            "There are {a} {things} in the room. {name} sorts them into {b} equal rows. "
            "How many {things} are in each row?",
        ),
        ("Each has {equation} {things}.",),
    ),
    Family(
        "more-than", ("a+b",), "",
        (
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}. "
            "How many {things} does {friend} have?",
            "{name} finds {a} {things}. {friend} finds {b} more than {name}. How many {things} does {friend} find?",
            "{friend} has {b} more {things} than {name}. {name} has {a} {things}. "
            "How many {things} does {friend} have?",
        ),
        ("{friend} has {equation} {things}.",),
    ),
)

TWO_STEPS = (
    Family(
        "buy-and-give", ("a+b", "r1-c"), "",
        (
            "{name} has {a} {things}. {He} buys {b} more. Then {he} gives {c} away. "
            "How many {things} does {name} have now?",
            "{name} finds {a} {things}. Then {he} finds {b} more and loses {c}. How many {things} are left?",
            "There are {a} {things} in the room. {name} brings {b} more. Then {he} takes {c} of them. "
            "How many {things} are there now?",
        ),
        ("First {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "three-days", ("a+b", "r1+c"), "",
        (
            "{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. "
            "How many {things} does {name} find in all?",
            "{name} buys {a} {things}. Then {he} buys {b} more. Then {he} buys {c} more. "
            "How many {things} does {name} have?",
            "{name} has {a} red {things}, {b} blue {things} and {c} green {things}. "
            "How many {things} does {name} have in all?",
        ),
        ("First {equation} {things}.", "In all {equation} {things}."),
    ),
    Family(
        "more-than-and-give", ("a+b", "r1-c"), "",
        (
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}. {friend} gives {c} away. "
            "How many {things} does {friend} have now?",
            "{name} finds {a} {things}. {friend} finds {b} more than {name}. Then {friend} loses {c}. "
            "How many {things} does {friend} have left?",
            "{friend} has {b} more {things} than {name}. {name} has {a} {things}. {friend} sells {c} {things}. "
            "How many {things} does {friend} have now?",
        ),
        ("{friend} has {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "groups-plus-extra", ("a*b", "r1+c"), "a",
        (
            "{name} has {a} {boxes}. There are {b} {things} in each. {He} buys {c} more {things}. "
            "How many {things} does {name} have now?",
            "{name} fills {a} {boxes}. {He} puts {b} {things} in each. Then {c} {things} are left over. "
            "How many {things} are there in all?",
            "There are {a} {boxes} with {b} {things} in each. {name} brings {c} more {things}. "
            "How many {things} are there now?",
        ),
        ("In all {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "price-and-paid", ("a*b", "r1-c"), "a",
        (
            "{name} buys {a} {things}. Each costs {b} dollars. {He} has paid {c} dollars. "
            "How many dollars must {name} still pay?",
            "{name} sells {a} {things} for {b} dollars each. Then {he} spends {c} dollars. "
            "How many dollars are left?",
            "{name} wants {a} {things} at {b} dollars each. {He} has only {c} dollars. "
            "How many more dollars does {name} need?",
        ),
        ("In all {equation} dollars.", "Then {equation} dollars."),
    ),
    Family(
        "save-and-spend", ("a*b", "r1-c"), "b",
        (
            "{name} saves {a} dollars a day for {b} days. Then {he} spends {c} dollars on {things}. "
            "How many dollars are left?",
            "{name} gets {a} dollars each day. After {b} days {he} buys {things} for {c} dollars. "
            "How many dollars does {name} have now?",
            "{name} sells {things} and earns {a} dollars a day. {He} works for {b} days. Then {he} gives {c} dollars "
            "away. How many dollars does {name} have now?",
        ),
        ("In all {equation} dollars.", "Then {equation} dollars."),
    ),
    Family(
        "find-and-share", ("a+b", "r1/c"), "c",
        (
            "{name} has {a} {things}. {He} buys {b} more. {He} shares them equally among {c} friends. "
            "How many {things} does each friend get?",
            "{name} has {a} red {things} and {b} blue {things}. {He} puts them equally into {c} boxes. "
            "How many {things} are in each?",
            "There are {a} {things} in the room. {name} brings {b} more. They are sorted into {c} equal rows. "
            "How many {things} are in each row?",
        ),
        ("In all {equation} {things}.", "Each has {equation} {things}."),
    ),
)

THREE_STEPS = (
    Family(
        "groups-extra-and-give", ("a*b", "r1+c", "r2-d"), "a",
        (
            "{name} has {a} {boxes}. There are {b} {things} in each. {He} buys {c} more {things}. "
            "Then {he} gives {d} away. How many {things} does {name} have now?",
            "{name} fills {a} {boxes}. {He} puts {b} {things} in each. {He} finds {c} more {things} and loses {d}. "
            "How many {things} are left?",
            "There are {a} {boxes} with {b} {things} in each. {name} brings {c} more {things}. Then {he} sells {d} "
            "{things}. How many {things} are there now?",
        ),
        ("In all {equation} {things}.", "Then {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "trip-with-legs", ("a+b", "r1+c", "r2+d"), "",
        (
            "{name} walks {a} miles to the {place}. Then {he} walks {b} miles to the {next_place} and {c} miles home. "
            "Later {he} runs {d} miles. How many miles does {name} go in all?",
            "{name} rides {a} miles to the {place}, {b} miles to the {next_place}, {c} miles to a friend and {d} miles "
            "home. How many miles does {name} ride in all?",
            "The {place} is {a} miles away. The {next_place} is {b} miles further. {name} goes to both. Then {he} goes "
            "{c} miles by bus and {d} miles by train. How many miles does {name} go in all?",
        ),
        ("First {equation} miles.", "Then {equation} miles.", "In all {equation} miles."),
    ),
    Family(
        "together-and-give", ("a+b", "a+r1", "r2-c"), "",
        (
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}. Together they give {c} away. "
            "How many {things} do they have now?",
            "{name} finds {a} {things}. {friend} finds {b} more than {name}. Together they lose {c}. "
            "How many {things} do they have left?",
            "{friend} has {b} more {things} than {name}. {name} has {a} {things}. Together they sell {c} {things}. "
            "How many {things} do they have now?",
        ),
        ("{friend} has {equation} {things}.", "In all {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "twice-and-give", ("a+b", "r1*2", "r2-c"), "",
        (
            "{name} has {a} {things}. {He} buys {b} more. {friend} now has twice as many {things} as {name}. "
            "{friend} gives {c} away. How many {things} does {friend} have now?",
            "{name} finds {a} {things}. Then {he} finds {b} more. {friend} finds twice as many {things} as {name} and "
            "loses {c}. How many {things} does {friend} have left?",
            "{name} has {a} red {things} and {b} blue {things}. {friend} has twice as many {things} as {name}. "
            "{friend} sells {c} {things}. How many {things} does {friend} have now?",
        ),
        ("{name} has {equation} {things}.", "{friend} has {equation} {things}.", "Then {equation} {things}."),
    ),
    Family(
        "two-prices", ("a*b", "c*d", "r1+r2"), "ac",
        (
            "{name} buys {a} {things} and {c} {others}. The {things} cost {b} dollars each. The {others} cost {d} "
            "dollars each. How many dollars does {name} pay in all?",
            "{name} sells {a} {things} for {b} dollars each. Then {he} sells {c} {others} for {d} dollars each. "
            "How many dollars does {name} get in all?",
            "{name} wants {a} {things} at {b} dollars each. {He} also wants {c} {others} at {d} dollars each. "
            "How many dollars does {name} need?",
        ),
        (
            "The {things} cost {equation} dollars.", "The {others} cost {equation} dollars.",
            "In all {equation} dollars.",
        ),
    ),
    Family(
        "groups-extra-and-share", ("a*b", "r1+c", "r2/d"), "ad",
        (
            "{name} has {a} {boxes}. There are {b} {things} in each. {He} buys {c} more {things}. {He} shares them "
            "all equally among {d} friends. How many {things} does each friend get?",
            "{name} empties {a} {boxes} with {b} {things} in each. {He} finds {c} more {things}. {He} sorts them all "
            "into {d} equal rows. How many {things} are in each row?",
            "There are {a} {boxes} with {b} {things} in each. {name} brings {c} more {things}. They are shared equally "
            "among {d} people. How many {things} does each get?",
        ),
        ("In all {equation} {things}.", "Then {equation} {things}.", "Each has {equation} {things}."),
    ),
    Family(
        "save-spend-and-share", ("a*b", "r1-c", "r2/d"), "bd",
        (
            "{name} saves {a} dollars a day for {b} days. {He} spends {c} dollars on {things}. {He} shares the rest "
            "equally among {d} friends. How many dollars does each friend get?",
            "{name} gets {a} dollars each day. After {b} days {he} buys {things} for {c} dollars. {He} puts the rest "
            "equally into {d} boxes. How many dollars are in each?",
            "{name} sells {things} and earns {a} dollars a day. {He} works for {b} days. Then {he} loses {c} dollars. "
            "The rest is shared equally among {d} people. How many dollars does each get?",
        ),
        ("In all {equation} dollars.", "Then {equation} dollars.", "Each has {equation} dollars."),
    ),
)

FOUR_STEPS = (
    Family(
        "two-prices-and-paid", ("a*b", "c*d", "r1+r2", "r3-e"), "ac",
        (
            "{name} buys {a} {things} and {c} {others}. The {things} cost {b} dollars each. The {others} cost {d} "
            "dollars each. {He} has paid {e} dollars. How many dollars must {name} still pay?",
            "{name} sells {a} {things} for {b} dollars each. Then {he} sells {c} {others} for {d} dollars each. "
            "{He} spends {e} dollars. How many dollars are left?",
            "{name} wants {a} {things} at {b} dollars each. {He} also wants {c} {others} at {d} dollars each. "
            "{He} has only {e} dollars. How many more dollars does {name} need?",
        ),
        (
            "The {things} cost {equation} dollars.", "The {others} cost {equation} dollars.",
            "In all {equation} dollars.", "Then {equation} dollars.",
        ),
    ),
    Family(
        "together-give-and-share", ("a+b", "a+r1", "r2-c", "r3/d"), "d",
        (
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}. Together they give {c} away. They "
            "share the rest equally among {d} people. How many {things} does each get?",
            "{name} finds {a} {things}. {friend} finds {b} more than {name}. Together they lose {c}. They put the rest "
            "equally into {d} boxes. How many {things} are in each?",
            "{friend} has {b} more {things} than {name}. {name} has {a} {things}. Together they sell {c} {things}. "
            "They sort the rest into {d} equal rows. How many {things} are in each row?",
        ),
        (
            "{friend} has {equation} {things}.", "In all {equation} {things}.", "Then {equation} {things}.",
            "Each has {equation} {things}.",
        ),
    ),
    Family(
        "give-twice-and-give", ("a+b", "r1-c", "r2*2", "r3-d"), "",
        (
            "{name} has {a} {things}. {He} buys {b} more. Then {he} gives {c} away. {friend} now has twice as many "
            "{things} as {name}. {friend} gives {d} away. How many {things} does {friend} have now?",
            "{name} finds {a} {things}. Then {he} finds {b} more and loses {c}. {friend} finds twice as many {things} "
            "as {name} has left. {friend} loses {d}. How many {things} does {friend} have left?",
            "{name} has {a} red {things} and {b} blue {things}. {He} sells {c} of them. {friend} now has twice as many "
            "{things} as {name}. {friend} sells {d} {things}. How many {things} does {friend} have now?",
        ),
        (
            "{name} has {equation} {things}.", "Then {equation} {things}.", "{friend} has {equation} {things}.",
            "Then {equation} {things}.",
        ),
    ),
    Family(
        "there-and-back", ("a+b", "r1+c", "r2*2", "r3-d"), "",
        (
            "{name} walks {a} miles to the {place}, {b} miles to the {next_place} and {c} miles to a friend. Then {he} "
            "goes back the same way. {He} takes a bus for {d} miles of the whole trip. "
            "How many miles does {name} walk?",
            "The {place} is {a} miles away. The {next_place} is {b} miles further. A friend lives {c} miles further. "
            "{name} goes to the friend and back. {He} has gone {d} miles. How many miles are left?",
            "{name} rides {a} miles to the {place}, {b} miles to the {next_place} and {c} miles to a friend. Then {he} "
            "rides back the same way. The trip by bus is {d} miles shorter. "
            "How many miles is the trip by bus?",
        ),
        ("First {equation} miles.", "Then {equation} miles.", "In all {equation} miles.", "Then {equation} miles."),
    ),
    Family(
        "groups-shared-and-used", ("a*b", "r1+c", "r2/d", "r3-e"), "ad",
        (
            "{name} has {a} {boxes}. There are {b} {things} in each. {He} buys {c} more {things}. {He} shares them "
            "equally among {d} friends. Each friend gives {e} away. How many {things} does each friend have now?",
            "{name} fills {a} {boxes}. {He} puts {b} {things} in each. {He} finds {c} more {things}. {He} sorts them "
            "all into {d} equal rows. {He} takes {e} from each row. How many {things} are left in each row?",
            "There are {a} {boxes} with {b} {things} in each. {name} brings {c} more {things}. They are shared equally "
            "among {d} people. Each one loses {e}. How many {things} does each have left?",
        ),
        (
            "In all {equation} {things}.", "Then {equation} {things}.", "Each has {equation} {things}.",
            "Then {equation} {things}.",
        ),
    ),
)

FIVE_STEPS = (
    Family(
        "two-prices-paid-and-share", ("a*b", "c*d", "r1+r2", "r3-e", "r4/f"), "acf",
        (
            "{name} buys {a} {things} and {c} {others}. The {things} cost {b} dollars each. The {others} cost {d} "
            "dollars each. {He} has paid {e} dollars. {He} pays the rest in {f} equal parts. "
            "How many dollars is each part?",
            "{name} sells {a} {things} for {b} dollars each. Then {he} sells {c} {others} for {d} dollars each. "
            "{He} spends {e} dollars. {He} shares the rest equally among {f} friends. "
            "How many dollars does each friend get?",
            "{name} wants {a} {things} at {b} dollars each. {He} also wants {c} {others} at {d} dollars each. "
            "{He} has only {e} dollars. {He} saves the rest in {f} days, the same each day. "
            "How many dollars does {name} save each day?",
        ),
        (
            "The {things} cost {equation} dollars.", "The {others} cost {equation} dollars.",
            "In all {equation} dollars.", "Then {equation} dollars.", "One part is {equation} dollars.",
        ),
    ),
    Family(
        "earn-buy-and-share", ("a*b", "c*d", "r1-r2", "r3/e", "r4+f"), "bce",
        (
            "{name} earns {a} dollars a day for {b} days. {He} buys {c} {things} for {d} dollars each. {He} shares the "
            "rest equally among {e} friends. Each friend had {f} dollars before. "
            "How many dollars does each friend have now?",
            "{name} saves {a} dollars a day for {b} days. {He} buys {c} {things} at {d} dollars each. {He} puts the "
            "rest equally into {e} boxes. Each box held {f} dollars before. "
            "How many dollars are in each box now?",
            "{name} wants {c} {things}, which cost {d} dollars each. {He} gets {a} dollars a day for {b} days, buys "
            "them and shares the rest equally among {e} people. Each of them adds {f} dollars. "
            "How many dollars does each of them have now?",
        ),
        (
            "In all {equation} dollars.", "The {things} cost {equation} dollars.", "Then {equation} dollars.",
            "Each has {equation} dollars.", "Then {equation} dollars.",
        ),
    ),
    Family(
        "big-and-small-groups", ("a*b", "c*d", "r1+r2", "r3+e", "r4-f"), "ac",
        (
            "{name} has {a} big {boxes} with {b} {things} in each. {He} also has {c} small {boxes} with {d} {things} "
            "in each. {He} buys {e} more {things}. Then {he} gives {f} away. How many {things} does {name} have now?",
            "{name} fills {a} big {boxes} and {c} small {boxes}. {He} puts {b} {things} in each big one and {d} in "
            "each small one. {He} finds {e} more {things} and loses {f}. How many {things} are left?",
            "There are {a} big {boxes} with {b} {things} in each and {c} small {boxes} with {d} {things} in each. "
            "{name} brings {e} more {things}. Then {he} sells {f} {things}. How many {things} are there now?",
        ),
        (
            "The big {boxes} hold {equation} {things}.", "The small {boxes} hold {equation} {things}.",
            "In all {equation} {things}.", "Then {equation} {things}.", "Then {equation} {things}.",
        ),
    ),
    Family(
        "twice-share-and-add", ("a+b", "r1*2", "r2-c", "r3/d", "r4+e"), "d",
        (
            "{name} has {a} {things}. {He} buys {b} more. {friend} now has twice as many {things} as {name}. {friend} "
            "gives {c} away and shares the rest equally among {d} people. Each of them finds {e} more. "
            "How many {things} does each of them have now?",
            "{name} finds {a} {things}. Then {he} finds {b} more. {friend} finds twice as many {things} as {name} and "
            "loses {c}. {friend} puts the rest equally into {d} boxes. Then {friend} adds {e} to each. "
            "How many {things} are in each box now?",
            "{name} has {a} red {things} and {b} blue {things}. {friend} has twice as many {things} as {name}. "
            "{friend} sells {c} {things} and sorts the rest into {d} equal rows. Then {friend} adds {e} to each row. "
            "How many {things} are in each row now?",
        ),
        (
            "{name} has {equation} {things}.", "{friend} has {equation} {things}.", "Then {equation} {things}.",
            "Each has {equation} {things}.", "Then {equation} {things}.",
        ),
    ),
    Family(
        "there-and-back-in-parts", ("a+b", "r1+c", "r2*2", "r3-d", "r4/e"), "e",
        (
            "{name} plans a trip of {a} miles to the {place}, {b} miles to the {next_place}, {c} miles to a friend and "
            "back the same way. {He} goes {d} miles by bus. {He} walks the rest in {e} days, the same each day. "
            "How many miles does {name} walk each day?",
            "The {place} is {a} miles away. The {next_place} is {b} miles further. A friend lives {c} miles further. "
            "{name} goes to the friend and back. {He} has gone {d} miles. {He} goes the rest in {e} equal parts. "
            "How many miles is each part?",
            "{name} rides {a} miles to the {place}, {b} miles to the {next_place} and {c} miles to a friend. Then {he} "
            "rides back the same way. The trip by bus is {d} miles shorter and takes {e} hours. "
            "How many miles does the bus go in one hour?",
        ),
        (
            "First {equation} miles.", "Then {equation} miles.", "In all {equation} miles.", "Then {equation} miles.",
            "One part is {equation} miles.",
        ),
    ),
)

# fmt: on

FAMILIES = (*ONE_STEP, *TWO_STEPS, *THREE_STEPS, *FOUR_STEPS, *FIVE_STEPS)
