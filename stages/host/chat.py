"""`mathmind chat`: questions to a model of the graph, answered as it goes, alone or beside another.

Grade-school problems have no turns, and no model here was trained on any of maths: every question is a conversation of its
own, in the prompt that eval used.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

from stages.harness.errors import InputError
from stages.host.reading import read
from stages.host.streaming import Answer, Drawing, Model
from stages.scoring.answers import extract_strict, parse_number

HISTORY = Path(".dvc/tmp/mathmind/chat/history")
SHOWN_EVERY = 1 / 20  # seconds: as often as an eye follows; a small model says a thousand tokens in one

Answers = list[Answer]  # one a model


def answers_to(question: str, models: Sequence[Model], drawing: Drawing) -> Iterator[Answers]:
    """Yields what the models have said so far, each a token further, until all have ended; closing it stops them."""
    latest = [Answer() for _ in models]
    with ExitStack() as stack:
        running = {place: stack.enter_context(closing(model.answer(question, drawing))) for place, model in enumerate(models)}
        while running:
            for place, answer in list(running.items()):
                said = next(answer, None)
                if said is None:
                    del running[place]
                else:
                    latest[place] = said
            if running:
                yield list(latest)


def whole_answers(question: str, models: Sequence[Model], drawing: Drawing) -> Answers:
    """What the models say to a question."""
    answers: Answers = []
    for answers in answers_to(question, models, drawing):
        pass
    return answers


def value_of(answer: Answer) -> Fraction | None:
    """The number that an answer declares, or None."""
    declared = extract_strict(answer.text)
    return parse_number(declared) if declared else None


def agree(answers: Answers) -> bool:
    """Whether all declare the same number."""
    return None not in (values := [value_of(answer) for answer in answers]) and len(set(values)) == 1


def as_json(question: str, models: Sequence[Model], answers: Answers) -> dict[str, Any]:
    """One model's answer as a flat object; of two, each under its name, and whether they agree."""
    rows = [_row(answer) for answer in answers]
    if len(models) == 1:
        return {"question": question, "model": models[0].name, **rows[0]}
    return {
        "question": question,
        "models": {model.name: row for model, row in zip(models, rows, strict=True)},
        "agree": agree(answers),
    }


def _row(answer: Answer) -> dict[str, Any]:
    reading = read(answer.text)
    return {
        "working": reading.working,
        "answer": reading.answer,
        "completion": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
    }


def as_text(models: Sequence[Model], answers: Answers) -> str:
    """Working, then a line `answer: N`, without colours; of two models each below its name, and last whether they agree."""
    blocks = [_block(answer) for answer in answers]
    if len(models) == 1:
        return blocks[0]
    named = [f"{model.name}:\n{block}" for model, block in zip(models, blocks, strict=True)]
    return "\n".join([*named, verdict(answers)])


def _block(answer: Answer) -> str:
    reading = read(answer.text)
    return "\n".join(filter(None, [reading.working, f"answer: {'none' if reading.answer is None else reading.answer}"]))


def verdict(answers: Answers) -> str:
    """Whether two answers agree, in words."""
    first, second = (read(answer.text).answer for answer in answers)
    if agree(answers):
        return f"the answers agree: {first}"
    if first is second is None:
        return "neither declares an answer"
    return f"the answers differ: {first or 'none'} and {second or 'none'}"


def piped_questions() -> Iterator[str]:
    """The lines of standard input as they come; empty ones are passed over."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            question = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise InputError(f"standard input, line {number}: not UTF-8: convert it, for example with iconv") from None
        if question:
            yield question


def answer_plainly(questions: Iterator[str], models: Sequence[Model], drawing: Drawing, as_rows: bool) -> None:
    """Answers questions for a file or another program: a JSON object a line, or text with an empty line between answers."""
    for number, question in enumerate(questions):
        answers = whole_answers(question, models, drawing)
        if as_rows:
            print(json.dumps(as_json(question, models, answers), ensure_ascii=False), flush=True)
        else:
            print(*[""] * (number > 0), as_text(models, answers), sep="\n", flush=True)


def talk(folder: Path, models: Sequence[Model], drawing: Drawing) -> None:
    """Asks for questions at a prompt and shows the answers, until Ctrl-D, or Ctrl-C where no answer is being given."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{' and '.join(model.made_of for model in models)}. Ctrl-C stops an answer; Ctrl-D ends.", style="dim")
    for question in _typed_questions(folder):
        try:
            show(console, question, models, drawing)
        except InputError as error:
            console.print(str(error), style="yellow", markup=False)


def show(console, question: str, models: Sequence[Model], drawing: Drawing) -> bool:
    """Shows an answer as it comes, working apart from answer, side by side where two models give one; False where it was stopped."""
    from rich.live import Live

    shown, answers = 0.0, [Answer() for _ in models]
    with _stoppable() as stop, closing(answers_to(question, models, drawing)) as coming:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for answers in coming:
                if (now := time.monotonic()) - shown >= SHOWN_EVERY:
                    live.update(_Tail(_view(models, answers)), refresh=True)
                    shown = now
                if stop.is_set():
                    break
    console.print(_view(models, answers, stop.is_set()))
    if len(models) > 1 and not stop.is_set():
        console.print(verdict(answers), style="green" if agree(answers) else "yellow", markup=False)
    return not stop.is_set()


@contextmanager
def _stoppable() -> Iterator[Event]:
    """Ctrl-C sets the event that is yielded; a second one, before anything has heard of the first, interrupts as always."""
    stop = Event()

    def press(number, frame) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _view(models: Sequence[Model], answers: Answers, stopped: bool = False):
    """Answers, whole or not, as rich shows them."""
    from rich.table import Table

    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in models:
        grid.add_column(ratio=1)
    if len(models) > 1:
        grid.add_row(*(model.name for model in models), style="bold")
    grid.add_row(*(_text(answer, stopped) for answer in answers))
    return grid


def _text(answer: Answer, stopped: bool):
    from rich.text import Text

    ended = stopped or answer.finish_reason is not None
    reading = read(answer.text, ended)
    text = Text(_printable(reading.working), style="dim")
    if reading.answer is not None:
        text.append("\n" if text else "").append(_printable(reading.answer), style="not dim bold green")
    notes = {None: "stopped", "length": f"cut off at {answer.tokens} tokens", "stop": None}
    note = notes[answer.finish_reason] or ("no answer declared" if reading.answer is None else None)
    if ended and note:
        text.append("\n" if text else "").append(f"({note})", style="not dim yellow")
    return text


def _printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


class _Tail:
    """The last lines of what is shown, as many as the terminal has, so that a long answer is seen where it grows."""

    def __init__(self, whole) -> None:
        self.whole = whole

    def __rich_console__(self, console, options):
        from rich.segment import Segment

        for line in console.render_lines(self.whole, options.update(height=None), pad=False)[2 - console.height :]:
            yield from line
            yield Segment.line()


def _typed_questions(folder: Path) -> Iterator[str]:
    """What is typed at the prompt, with the history of earlier chats; a paste of many lines is one question."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    (folder / HISTORY).parent.mkdir(parents=True, exist_ok=True)
    session = PromptSession(history=FileHistory(str(folder / HISTORY)), multiline=True, key_bindings=keys)
    while True:
        try:
            question = session.prompt("> ", prompt_continuation="  ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question
