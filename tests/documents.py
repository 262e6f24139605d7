"""The commands that README.md and the pages of docs/ tell a reader to type, and what they show below them."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.imports import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(file for folder in ("docs", "data", "models", "benchmarks", "docker") for file in (ROOT / folder).rglob("*.md"))]
)  # fmt: skip
PROGRAMS = r"mathmind|dvc|make|git|docker/(?:build|run|lock|audit|install)|benchmarks/[\w.]+|\.ci/\w+|pytest|python3?|pip|uv|apt-get|" \
           r"export|cp|rm|mkdir|cd|cat|curl|jq|eval|wandb|tensorboard|hf|vllm|llama-server|ollama|sbatch|sky|apptainer|docker|rsync|\."  # fmt: skip
SETTING = r"[A-Z_]+=\S* "
COMMAND = re.compile(rf"(?:{SETTING})*(?:{PROGRAMS}) \S|(?:docker/(?:build|lock|audit)|\.ci/\w+)$")
BLOCK = re.compile(r"^```(\w*)\n((?:.*\n)*?)```$|((?:^    .*\n)+)", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|<\w+>|FROM=folder|bundle\.pem|mirror/\S+|\w+=\.\.\.")  # what stands for something of the reader's


class Command(NamedTuple):
    """One command as it stands in a page, and the lines that the page shows below it."""

    page: str
    line: int
    text: str
    shown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.text}"


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section_of(page: str, title: str) -> str:
    """A section's text, up to the next heading of its level or above, with all before it blanked so that lines keep their numbers."""
    text = read_page(page)
    heading = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert heading, f"{page} has no section {title}"
    end = re.compile(rf"^#{{1,{len(heading[1])}}} ", re.MULTILINE).search(text, heading.end())
    return "\n" * text[: heading.end()].count("\n") + text[heading.end() : end.start() if end else None]


@cache
def in_blocks(page: str, section: str | None = None) -> tuple[Command, ...]:
    """The commands of a page's blocks, or of one section's: in a block that marks any by `$ `, those; else those that begin as one does."""
    text = section_of(page, section) if section else read_page(page)
    found: list[Command] = []
    for block in BLOCK.finditer(text):
        if block[1]:  # another language's
            continue
        content, first = (block[2], 2) if block[3] is None else (block[3], 1)
        first += text[: block.start()].count("\n")
        marked = re.search(r"^\$ ", content, re.MULTILINE)
        for number, line in enumerate(content.splitlines(), first):
            if line.startswith("$ ") or (not marked and COMMAND.match(line.strip())):
                found.append(Command(page, number, without_remark(line.strip().removeprefix("$ "))))
            elif marked and found and line.strip() != "...":
                found[-1] = found[-1]._replace(shown=(*found[-1].shown, line))
    return tuple(found)


def without_remark(line: str) -> str:
    return re.sub(r"\s+#\s.*$", "", line)


@cache
def in_sentences(page: str) -> tuple[Command, ...]:
    """The commands that stand between backticks in a page's sentences and tables."""
    text = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), read_page(page))
    spans = [(text[: span.start()].count("\n") + 1, " ".join(span[1].split())) for span in INLINE.finditer(text)]
    return tuple(Command(page, line, command) for line, command in spans if COMMAND.match(command))


def commands_of(page: str) -> list[Command]:
    return sorted([*in_blocks(page), *in_sentences(page)], key=lambda command: command.line)


def is_named_in(command: str, file: str | Path) -> bool:
    """Whether a file holds every word of a command but the program's own name and what stands for something of the reader's."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return all(word in text for word in command.split()[1:] if not PLACEHOLDER.fullmatch(word))
