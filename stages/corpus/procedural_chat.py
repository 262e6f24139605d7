"""Small talk that a tiny model can learn: every request of each kind, with its reply.

None of it is a word problem. It stands in for the general chat that keeps a larger model able to talk.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product

from stages.corpus.procedural_families import NAMES, THINGS

Exchange = tuple[str, str]  # a request and its reply

COLOURS = ("red", "blue", "green", "black", "white", "brown")
OBJECTS = tuple(thing.removesuffix("s") for thing in THINGS)
LISTED = 12  # objects used in lists of three: 1,320 lists are enough, all 24 would make 12,144


def count_up() -> Iterator[Exchange]:
    for first, length in product(range(1, 51), range(3, 7)):
        counted = range(first, first + length)
        yield f"Count from {first} to {counted[-1]}.", _listed(counted)
        yield f"Say the numbers from {first} to {counted[-1]}.", _listed(counted)


def count_down() -> Iterator[Exchange]:
    for last, length in product(range(1, 51), range(3, 7)):
        counted = range(last + length - 1, last - 1, -1)
        yield f"Count down from {counted[0]} to {last}.", _listed(counted)


def larger_number() -> Iterator[Exchange]:
    for first, second in permutations(range(2, 51), 2):
        yield f"Which number is larger, {first} or {second}?", f"{max(first, second)}."


def next_number() -> Iterator[Exchange]:
    for number in range(2, 99):
        yield f"Which number comes after {number}?", f"{number + 1}."
        yield f"Which number comes before {number}?", f"{number - 1}."


def reverse_numbers() -> Iterator[Exchange]:
    for numbers in (*permutations(range(2, 11), 3), *permutations(range(2, 8), 4)):
        yield f"List {_listed(numbers)[:-1]} in reverse.", _listed(numbers[::-1])


def repeat_sentence() -> Iterator[Exchange]:
    for name, colour, thing in product(NAMES, COLOURS, OBJECTS):
        yield f"Repeat this sentence: {name} has the {colour} {thing}.", f"{name} has the {colour} {thing}."


def name_the_object() -> Iterator[Exchange]:
    for name, colour, thing in product(NAMES, COLOURS, OBJECTS):
        yield f"{name} holds the {colour} {thing}. What does {name} hold?", f"The {colour} {thing}."


def say_hello() -> Iterator[Exchange]:
    for greeting, name in product(("Hello", "Hi", "Good morning", "Good evening"), NAMES):
        yield f"{greeting}, I am {name}.", f"{greeting}, {name}! How can I help?"
        yield f"{greeting}! Say hello to {name}.", f"Hello, {name}!"
        yield f"{greeting}, my name is {name}. What is my name?", f"Your name is {name}."


def in_the_list() -> Iterator[Exchange]:
    for count, words in enumerate(permutations(OBJECTS[:LISTED], 3)):
        absent = [word for word in OBJECTS if word not in words]
        yield f"Is the word {words[count % 3]} in the list {_listed(words)[:-1]}?", "Yes."
        yield f"Is the word {absent[count % len(absent)]} in the list {_listed(words)[:-1]}?", "No."


def first_or_last_word() -> Iterator[Exchange]:
    for words in permutations(OBJECTS[:LISTED], 3):
        yield f"What is the first word of {_listed(words)[:-1]}?", f"{words[0].capitalize()}."
        yield f"What is the last word of {_listed(words)[:-1]}?", f"{words[-1].capitalize()}."


CHATS: dict[str, Callable[[], Iterator[Exchange]]] = {
    "count-up": count_up,
    "count-down": count_down,
    "larger-number": larger_number,
    "next-number": next_number,
    "reverse-numbers": reverse_numbers,
    "repeat-sentence": repeat_sentence,
    "name-the-object": name_the_object,
    "say-hello": say_hello,
    "in-the-list": in_the_list,
    "first-or-last-word": first_or_last_word,
}


def _listed(words: Iterable[int | str]) -> str:
    return ", ".join(map(str, words)) + "."
