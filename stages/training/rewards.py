"""The three rewards of GRPO, on the report's scale, which sums to 9.5 for a perfect completion, and a measurement.

Each is a pure function that trl's GRPOTrainer takes as it is: `f(completions, **columns) -> list[float]`, one reward a
completion, where a completion is a text or a list of chat messages, of which the last is read. No completion makes them
raise.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from stages.corpus.marks import ANY_STOP, SOLUTION_END, SOLUTION_START, TAGS, WORKING_END, WORKING_START
from stages.scoring.answers import extract_solution_tag, gold_answer, gold_text, parse_number, plain_form

Completion = str | Sequence[dict]

_TRAILING = re.compile(rf"(?:\s|{'|'.join(map(re.escape, ANY_STOP))})*")
_WHOLE_FORM = re.compile(
    rf"\s*{WORKING_START}(?P<working>.*){WORKING_END}\s*{SOLUTION_START}(?P<solution>.*){SOLUTION_END}", re.DOTALL
)


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


def match_format_exactly(completions: Sequence[Completion], **_) -> list[float]:
    """3.0 for the working between its tags, then the answer between the solution tags, and nothing else; 0.0 otherwise.

    Each tag stands there once, neither part is empty, between the parts and before them there is white space at most,
    and after them white space and stop tokens.
    """
    return [3.0 if _is_whole_form(_text(completion)) else 0.0 for completion in completions]


def _is_whole_form(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    body, end_tag, rest = text.partition(SOLUTION_END)
    match = _WHOLE_FORM.fullmatch(body + end_tag)
    parts = match.groups() if match else ()
    return (
        match is not None
        and _TRAILING.fullmatch(rest) is not None
        and all(part.strip() for part in parts)
        and not any(token in body for token in ANY_STOP)
    )


def match_format_approximately(completions: Sequence[Completion], **_) -> list[float]:
    """+0.5 for each of the closing working tag and the two solution tags that is there exactly once, -1.0 otherwise.

    From -3.0 to 1.5. The opening working tag is left out, as in the report.
    """
    counted = (WORKING_END, SOLUTION_START, SOLUTION_END)
    texts = map(_text, completions)
    return [sum(0.5 if text.count(tag) == 1 else -1.0 for tag in counted) for text in texts]


def check_final_answer(completions: Sequence[Completion], answer: Sequence[str], **_) -> list[float]:
    """How right the text between the solution tags is; `answer` holds each completion's gold answer or GSM8K solution.

    | reward | the text |
    | --- | --- |
    | 5.0 | the gold number to the letter (its thousands commas may be left out) |
    | 3.5 | equal in value but not in form: space around, `$`, commas, a unit, 18.0, a full stop |
    | 2.0 | within 10% of it: e = abs(value - gold) / abs(gold) <= 0.1; for a gold 0, e = abs(value) |
    | 1.0 | within 20% |
    | -2.5 - 2 x / (1 + x), x = e - 0.2 | farther: falls from -2.5, and comes to -4.5 at infinity |
    | -4.5 | no solution tags, or no number between them |

    Raises InputError for a gold answer that is no number: the stage that prepares the data drops such rows.
    """
    return [_answer_reward(_text(text), gold) for text, gold in zip(completions, answer, strict=True)]


def check_exact_answer(completions: Sequence[Completion], answer: Sequence[str], **_) -> list[float]:
    """As `check_final_answer`, but every wrong number earns -2.5: nearness is not paid for.

    Graded nearness can teach a policy to leave a step out, where stopping short is nearer than a mistake
    (docs/embedded-study.md).
    """
    return [_answer_reward(_text(text), gold, graded=False) for text, gold in zip(completions, answer, strict=True)]


def _answer_reward(completion: str, gold: str, graded: bool = True) -> float:
    expected, expected_text = gold_answer(gold), gold_text(gold)
    given_text = extract_solution_tag(completion)
    given = parse_number(given_text) if given_text is not None else None
    if given is None:
        return -4.5
    if given == expected:
        return 5.0 if given_text in (expected_text, plain_form(expected_text)) else 3.5
    if not graded:
        return -2.5
    error = abs(given - expected) / (abs(expected) or 1)
    if error <= Fraction(1, 10):
        return 2.0
    if error <= Fraction(1, 5):
        return 1.0
    beyond = error - Fraction(1, 5)
    return -2.5 - 2 * float(beyond / (1 + beyond))


def distinct(prompts: Sequence[Completion], completions: Sequence[Completion], **_) -> list[float]:
    """1.0 for a completion that no earlier one of the same prompt in the batch equals, 0.0 for a repeat.

    No reward: grpo weighs it with nothing, so that trl logs the share of distinct completions.
    """
    seen: set[tuple[str, str]] = set()
    shares = []
    for prompt, completion in zip(map(_text, prompts), map(_text, completions), strict=True):
        shares.append(0.0 if (prompt, completion) in seen else 1.0)
        seen.add((prompt, completion))
    return shares
