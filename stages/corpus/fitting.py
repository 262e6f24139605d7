"""Rows that are too long to train on whole, and what is left of them when they are cut to fit.

A trainer that cuts a row at its limit takes the stop token away, and with a solution its answer: the model learns to go on
and on. A row cut here still ends with its stop token, and one that would lose its answer is known as such.
"""

from dataclasses import dataclass

from stages.corpus import chat_format
from stages.corpus.lengths import CLOSE, Lengths
from stages.scoring.answers import extract_strict

Messages = list[dict[str, str]]

SPARE = CLOSE + 4  # tokens left for what follows a cut reply, and so many that its length is plain without a slow count


@dataclass(frozen=True)
class Fit:
    """How a chat fits into a number of tokens."""

    too_long: bool
    cut: Messages | None = None  # what fits of one that is too long, where anything does
    loses_answer: bool = False  # `cut` no longer declares the answer that the whole did


class Fitting:
    """Holds chats to so many tokens under a template."""

    def __init__(self, lengths: Lengths, template: str, most: int) -> None:
        self.lengths, self.template, self.most = lengths, template, most

    def is_over(self, messages: Messages) -> bool:
        """Whether a chat takes more tokens than allowed; one that ends with the user is a prompt, to be answered."""
        return self.lengths.over(self._rendered(messages), self.most)

    def whole(self, messages: Messages) -> Fit:
        """Whether a chat fits; one that is not to be cut."""
        return Fit(self.is_over(messages))

    def fit(self, messages: Messages) -> Fit:
        """What fits of a chat: the whole, or as many exchanges as do, or of a first one that is too long its start.

        A cut chat's length is near enough for counting; `sure` counts it.
        """
        start = self.lengths.cut(self._rendered(messages), self.most, self.most - SPARE)
        if start is None:
            return Fit(False)
        cut = self._exchanges(messages, start) or self._start_of_reply(messages, start)
        answer = extract_strict(messages[-1]["content"])
        return Fit(True, cut, cut is None or answer is None or extract_strict(cut[-1]["content"]) != answer)

    def sure(self, messages: Messages) -> Fit:
        """What surely fits of a chat: a last word cut in two may take more tokens than it did, and more than were spared."""
        fit = self.fit(messages)
        return Fit(True, None, True) if fit.cut and self.is_over(fit.cut) else fit

    def _exchanges(self, messages: Messages, start: str) -> Messages | None:
        """As many whole exchanges from the first as stand in the chat's start."""
        replies = [place for place, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        return next(
            (part for place in reversed(replies) if start.startswith(self._rendered(part := messages[: place + 1]))),
            None,
        )

    def _start_of_reply(self, messages: Messages, start: str) -> Messages | None:
        """The first exchange, its reply ending where the chat's start does; None where that start holds no reply."""
        first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        before = messages[:first]
        head = self._rendered(before)  # up to where the reply begins
        reply = start[len(head) :]
        return (
            [*before, {"role": "assistant", "content": reply}]
            if before and reply.strip() and start.startswith(head)
            else None
        )

    def _rendered(self, messages: Messages) -> str:
        return chat_format.render_messages(self.template, messages)
