"""Finds the answer in a model's text and compares it with the gold one: one extractor for reward and evaluation.

Two readings of a completion, both up to its first stop token:

- strict: what the model declares as its answer, in the `<SOLUTION>` tag, `\\boxed{}` or a `####` line. If several are
  there, the one that comes last in the text wins, whatever its notation. `<SOLUTION>` alone is what a reward reads.
- flexible: the last number anywhere. Reported beside the strict one, never rewarded.

Numbers compare exactly, as fractions: 0.1 + 0.2 never meets a float here.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from stages.corpus.marks import ANY_STOP, SOLUTION_END, SOLUTION_START, TAGS
from stages.harness.errors import InputError

# A longer text is prose, not a number. It also bounds every pattern that reads a whole answer, and the digits that
# int() is given (Python refuses more than 4,300).
LONGEST_ANSWER = 200

_STOP = re.compile("|".join(map(re.escape, ANY_STOP)))


class Declaration(NamedTuple):
    """An answer as the model declared it: `text[start:end]` is the whole notation, `answer` what stands inside."""

    start: int
    end: int
    answer: str


def until_stop(completion: str) -> str:
    """The completion up to its first stop token: what follows was never meant to be read."""
    return _STOP.split(completion, 1)[0]


# Declarations. A tag's text holds no second opening tag, so `<SOLUTION><SOLUTION>18</SOLUTION>` reads 18; a `####` line
# ends at a tag, so `<SOLUTION>#### 18</SOLUTION>` and `#### 18</SOLUTION>` do as well.
_TAG = rf"{SOLUTION_START}(?P<tag>(?:(?!{SOLUTION_START}).)*?){SOLUTION_END}"
_SOLUTION = re.compile(_TAG, re.DOTALL)
_BOX = r"\\(?:boxed|fbox)\s*(?P<brace>{)"
_LINE = rf"####(?P<line>(?:(?!{'|'.join(TAGS)})[^\n])*)"
_DECLARATION = re.compile(f"{_TAG}|{_BOX}|{_LINE}", re.DOTALL)
_FIRST_BOX = re.compile(_BOX)
_BRACE = re.compile(r"\\[{}]|[{}]")


def _closing_braces(text: str) -> dict[int, int]:
    """Maps every balanced `{` from the first box on to its `}`, by position; one pass, so nested input stays linear."""
    pairs, open_braces = {}, []
    if not (first := _FIRST_BOX.search(text)):
        return pairs
    for brace in _BRACE.finditer(text, first.start()):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            pairs[open_braces.pop()] = brace.start()
    return pairs


def _declarations(text: str) -> Iterator[Declaration]:
    closing = _closing_braces(text)
    for match in _DECLARATION.finditer(text):
        if match["tag"] is not None:
            yield Declaration(match.start(), match.end(), match["tag"])
        elif match["brace"]:
            end = closing.get(match.start("brace"))
            if end is not None:
                yield Declaration(match.start(), end + 1, text[match.end() : end])
        elif any(map(str.isnumeric, match["line"])):  # `#### Explanation` is a heading
            yield Declaration(match.start(), match.end(), match["line"])


def find_declaration(completion: str) -> Declaration | None:
    """The declared answer that comes last in the completion, or None.

    A tag or box that never closes (a truncated completion) declares nothing. Where no notation is used at all, a last
    line `A: N` with one number counts: the model solutions published with GSM8K are written so
    (openai/grade-school-math, example_model_solutions.jsonl).
    """
    text = until_stop(completion)
    last = None
    for last in _declarations(text):
        pass
    if last is None:
        text = text.rstrip()
        start = text.rfind("\n") + 1
        line = text[start:]
        if line.startswith("A:") and parse_number(line[2:]) is not None:
            last = Declaration(start, len(text), line[2:])
    return last


def extract_strict(completion: str) -> str | None:
    """The text of the declared answer, outer space removed, or None if none is declared; it need not be a number."""
    found = find_declaration(completion)
    return found.answer.strip() if found else None


def extract_solution_tag(completion: str) -> str | None:
    """The text between the last complete pair of solution tags exactly as written, or None: what a reward reads."""
    texts = _SOLUTION.findall(until_stop(completion))
    return texts[-1] if texts else None


# From here on: what is one number?

_MINUS_SIGNS = "\u2010\u2011\u2012\u2013\u2212"
_LOOKALIKES = {"\u066b": ".", "\u066c": ",", "\u2044": "/", "\u2215": "/", "\u00d7": "x", "\u22c5": "x"}
_THIN_SPACE = "\u2009"  # thin and no-break spaces part thousands; an ordinary space parts two numbers


class _PlainCharacters(dict):
    """Translation table, filled as characters are met: digits of any script, signs and spaces to their ASCII form."""

    def __missing__(self, code: int) -> str:
        self[code] = plain = self._plain(chr(code))
        return plain

    @staticmethod
    def _plain(character: str) -> str:
        decimal = unicodedata.decimal(character, None)
        category = unicodedata.category(character)
        if decimal is not None:
            return str(decimal)
        if character in _LOOKALIKES:
            return _LOOKALIKES[character]
        if character in "\u00a0\u2009\u202f":
            return _THIN_SPACE
        if character in _MINUS_SIGNS:
            return "-"
        if category == "Cf":  # zero-width and direction marks
            return ""
        if category == "Sc":  # every currency is a dollar
            return "$"
        if category == "No":  # 1½ is 1 1/2, never 11/2; ² and ① are not digits of a number
            fraction = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
            return f" {fraction} " if "/" in fraction else character
        return unicodedata.normalize("NFKC", character)


_PLAIN = _PlainCharacters()

_LATEX = {
    **dict.fromkeys("text textbf textit textrm mathrm mathbf mathit mathsf mbox boxed fbox displaystyle".split(), " "),
    **dict.fromkeys(("left", "right", "quad", "qquad", " ", ";", ":", "(", ")", "[", "]"), " "),
    **{"times": "x", "cdot": "x", "circ": "°", "!": "", ",": _THIN_SPACE, "%": "%", "$": "$", "&": "&", "_": "_"},
}
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{([\d,\s]*)\}\s*\{([\d,\s]*)\}|(\d)\s*(\d))")
_THIN_THOUSANDS = re.compile(rf"(?<=\d){_THIN_SPACE}(?=\d{{3}}(?!\d))")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER_OF_TEN = re.compile(r"(?<=\b10)[⁰¹²³⁴-⁹⁻]+")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*(?:\^\s*[23]\b|[²³])|\^\s*(?=°)")  # 18 cm^2 holds one number


def _latex_fraction(match: re.Match) -> str:
    above, below = match[1] or match[3] or "", match[2] or match[4] or ""
    return f" {above.strip()}/{below.strip()} "


def _plain(text: str) -> str:
    """The text with LaTeX, markdown bold and Unicode forms of digits and signs written in plain ASCII; linear time."""
    if not text.isascii():
        text = _POWER_OF_TEN.sub(lambda power: "^" + power[0].translate(_SUPERSCRIPTS), text)
        text = text.translate(_PLAIN)
    if "\\" in text:
        text = _FRACTION.sub(_latex_fraction, text)
        text = _COMMAND.sub(lambda command: _LATEX.get(command[1], command[0]), text)
    text = _THIN_THOUSANDS.sub(",", text)
    text = text.replace("{,}", ",").replace("{", " ").replace("}", " ").replace("**", " ")
    return _UNIT_POWER.sub("", text)


_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)"
# Three digits of exponent: 1e999 is a number, 1e999999999 would be a way to fill the memory.
_EXPONENT = r"(?:[eE]|\s*[xX*]\s*10\s*\^\s*)[-+]?\d{1,3}(?!\d)"
_MIXED_OR_FRACTION = rf"(?:{_WHOLE}\s+)?{_WHOLE}\s*/\s*{_WHOLE}"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:{_EXPONENT})?"

_LAST_NUMBER = re.compile(rf"(?=[-.\d])(?:(?<![\w)])-\$?)?(?:(?:{_WHOLE}[ ])?{_WHOLE}/{_WHOLE}|{_DECIMAL})")
_ONE_NUMBER = re.compile(
    rf"""
    (?: (?:[A-Za-z][A-Za-z' ]*)? (?:=|:|\bis\b) \s* )?   # "x =", "Answer:", "The answer is"
    \$*\s* (?P<sign>[-+])? \s*\$*\s*                     # -$18 and $-18
    (?: (?:(?P<whole>{_WHOLE})(?:\s+and)?\s+)? (?P<above>{_WHOLE})\s*/\s*(?P<below>{_WHOLE})
      | (?P<decimal>(?:{_WHOLE}(?:\.\d*)?|\.\d+)) (?P<exponent>{_EXPONENT})? )
    \s*[%$]*
    (?P<unit> [\s~/(-]* (?:[^\W\d_]|°) (?:[^\W\d_]|[\s°'’./,()$%&"~-])* )?
    \s*
    """,
    re.VERBOSE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that join a second quantity to the first, or may or may not scale it: "18 or more", "18 and a half", "18k".
_AMBIGUOUS = frozenset("and or to plus minus times half k hundreds thousands millions billions trillions".split())


def _unwrapped(text: str) -> str:
    """The text without what may stand around a number: space, emphasis, quotes, final punctuation, parentheses."""
    while True:
        shorter = text.strip().strip("*_`\"'“”‘’").rstrip(".!;,").strip()
        if shorter[:1] + shorter[-1:] in ("()", "[]"):
            shorter = shorter[1:-1]
        if shorter == text:
            return text
        text = shorter


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, or None.

    Accepted: space, quotes, `*`, `$...$` or parentheses around; a sign; any currency sign; commas (or thin spaces) in
    the right places of thousands; 18.0, .5, 3/4, 1 3/4, ½; 1e3 and 1.2 x 10^3 up to three digits of exponent; percent
    (50% is 50); unit words after it; thousand to trillion, which multiply; a name before it (`x = 18`, `Answer: 18`,
    `The answer is 18`); LaTeX's \\frac, \\text, \\boxed, \\$, \\%, \\times and spaces; digits and minus signs of any
    script; a final full stop.
    None: no number, two numbers ("3 or 4", "3 + 4 = 7", "1,2", "3:30"), "18 and a half", "18k", "about 18", number
    words, division by zero, a text longer than 200 characters.
    """
    text = text.strip()
    if len(text) > LONGEST_ANSWER:
        return None
    match = _ONE_NUMBER.fullmatch(_unwrapped(_plain(text)))
    if not match:
        return None
    words = re.findall(r"[^\W\d_]+", (match["unit"] or "").lower())
    scale = _SCALES.get(words[0], 1) if words else 1
    if not _AMBIGUOUS.isdisjoint(words):
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace(",", ""))
        if match["exponent"]:
            value *= Fraction(10) ** int(re.search(r"[-+]?\d+$", match["exponent"])[0])
    else:
        whole, above, below = (int((match[part] or "0").replace(",", "")) for part in ("whole", "above", "below"))
        if below == 0 or (match["whole"] and above >= below):  # "1 5/4" is more likely a slip than 9/4
            return None
        value = whole + Fraction(above, below)
    return (-value if match["sign"] == "-" else value) * scale


def extract_flexible(completion: str) -> str | None:
    """The last number in the text, written in plain ASCII, or None. A hyphen after a word or a digit is no sign."""
    for line in reversed(until_stop(completion).splitlines()):
        numbers = _LAST_NUMBER.findall(_plain(line))
        if numbers:
            return numbers[-1]
    return None


def gold_text(answer: str) -> str:
    """The final answer as written in a GSM8K `answer` field (after the last `####`), or a text that is only that."""
    found = find_declaration(answer)
    return (found.answer if found else answer).strip()


def gold_answer(answer: str) -> Fraction:
    """The value of a GSM8K `answer` field, or of a number written alone.

    Raises InputError, to which the caller adds the file and line that it alone knows.
    """
    value = parse_number(gold_text(answer)) if isinstance(answer, str) else None
    if value is None:
        end = answer[-60:] if isinstance(answer, str) else answer
        raise InputError(f"the gold answer {end!r} does not end in '####' and one number: mend or drop the row")
    return value


def plain_form(text: str) -> str:
    """A number as GSM8K mostly writes it: digits without commas or signs of money. Other texts stay as they are."""
    value = parse_number(text)
    return str(value) if value is not None and value.denominator == 1 else text.strip()


def equal(answer: str | Fraction | None, gold: Fraction) -> bool:
    """Whether an answer, a text or a value already read, is exactly the gold value."""
    value = parse_number(answer) if isinstance(answer, str) else answer
    return value is not None and value == gold
