"""The command line itself: its help, and what the Tab key offers, asked as bash asks it."""

import os
import shlex
import subprocess
import sys

import click
import pytest

from stages.__main__ import main
from stages.host.graph import read_yaml
from stages.host.models import FORMS, MODELS
from tests.imports import ROOT

LONGEST_LINE = 64  # of a command's first sentence, on a terminal of 80 columns


@pytest.fixture
def place(tmp_path):
    """A folder with a graph, a model whole, and GGUF files of two."""
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file in ("gguf/grpo/q8_0.gguf", "gguf/grpo/f16.gguf", "gguf/sft/q4_k_m.gguf", "base/config.json"):
        (tmp_path / "models" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / file).touch()
    return tmp_path


def offered(place, line: str) -> list[str]:
    """What bash would offer after a line that ends where Tab is pressed, by the function that click gives bash."""
    words = [*shlex.split(line), *([""] if line.endswith(" ") else [])]
    (place / "bin").mkdir(exist_ok=True)
    command = place / "bin/mathmind"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m stages "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    script = f"""
        eval "$(_MATHMIND_COMPLETE=bash_source mathmind)"
        COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
        _mathmind_completion mathmind; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("line", "wanted"), [
    ("mathmind cha", ["chat"]),
    ("mathmind chat ", ["base", "sft", "grpo"]),
    ("mathmind serve g", ["grpo"]),
    ("mathmind chat grpo --against ", ["base", "sft"]),
    ("mathmind chat grpo --gguf ", ["f16", "q8_0"]),
    ("mathmind chat --gguf q", ["q4_k_m", "q8_0"]),
    ("mathmind verify --stages merge@q", ["merge@qlora"]),
    ("mathmind seeds --n 3 grpo o", ["orpo"]),
    ("mathmind explain models/gguf/q", ["models/gguf/qlora"]),
    ("mathmind pin ", []),  # this profile has no source on a hub
])  # fmt: skip
def test_tab_offers_what_is_here(place, line, wanted):
    assert offered(place, line) == wanted


def test_tab_offers_nothing_and_says_nothing_where_there_is_no_graph(tmp_path):
    assert offered(tmp_path, "mathmind chat ") == []


def test_the_models_and_forms_are_the_graph_s():
    assert set(read_yaml(ROOT / "dvc.yaml")["stages"]["gguf-export"]["foreach"]) == set(MODELS)
    assert set(read_yaml(ROOT / "params.yaml")["gguf_export"]["files"]) == set(FORMS)


@pytest.mark.parametrize("name", main.commands)
def test_every_command_s_help_begins_with_a_line_that_fits(name):
    assert not main.commands[name].get_short_help_str(LONGEST_LINE).endswith("...")
    assert all(option.help for option in main.commands[name].params if isinstance(option, click.Option))


@pytest.mark.parametrize("name", main.commands)
def test_every_command_explains_what_it_takes(name):
    command, text = main.commands[name], main.commands[name].help
    assert len(text.splitlines()) > 2, "its help says no more than its first line"
    for argument in command.params:
        if isinstance(argument, click.Argument):
            assert argument.make_metavar(click.Context(command)).strip("[].") in text


NO_DATA = {"queue", "repro", "serve", "join", "plots-page", "report"}  # servers of a kind, stages, and what writes pages under names that are always the same


@pytest.mark.parametrize("name", sorted(set(main.commands) - NO_DATA))
def test_every_command_that_says_something_says_it_as_json_too(name):
    assert "--json" in {word for option in main.commands[name].params for word in option.opts}


@pytest.mark.parametrize("line", [
    "audit nothing", "chat grpo Why?", "chat nothing", "doctor", "doctor nothing", "explain", "explain nothing", "explain --check nothing",
    "pin", "pin nothing", "publish grpo", "publish grpo --to you/name", "publish grpo --to you/name --card card.md", "report", "repro",
    "score --predictions nothing --gold nothing", "seeds --n 1 grpo", "seeds --n 2 nothing", "serve grpo", "serve grpo --port many",
    "teach", "teach --limit 0", "verify --stages nothing", "nothing", "--nothing",
])  # fmt: skip
def test_what_is_not_there_or_not_understood_is_one_sentence_and_exit_2(tmp_path, line):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "1000", "OPENAI_API_KEY": "a key"}
    command = [sys.executable, "-m", "stages", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = [sentence for sentence in done.stderr.splitlines() if sentence and not sentence.startswith(("Usage: ", "Try "))]
    assert (done.returncode, done.stdout, len(said)) == (2, "", 1), done.stderr
    assert said[0].startswith("Error: ") and "Traceback" not in done.stderr
