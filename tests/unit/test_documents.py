"""Every command that README.md and the other pages tell a reader to type is typed by a test, or says here why it cannot be."""

import re

import pytest

from tests.documents import PAGES, Command, commands_of, in_blocks, in_sentences, is_named_in

COMMANDS, USES, NOTEBOOK, EXPERIMENTS = (f"tests/pipeline/test_{name}.py" for name in ("commands", "uses", "notebook", "experiments"))

# A test takes these blocks from the page, and types every command in them.
WALKED = {
    ("README.md", "Change one thing"): USES,
    ("README.md", "Talk to it"): COMMANDS,
    ("README.md", "Score anything, trust it further"): COMMANDS,
    ("README.md", "What is deterministic, and how that is checked"): COMMANDS,
    ("docs/experiments.md", None): USES,
    ("docs/clusters.md", "A sweep on one GPU, two or eight"): USES,
    ("docs/chat.md", None): COMMANDS,
    ("docs/first-run.md", "The first changed thing"): COMMANDS,
    ("docs/publishing.md", None): COMMANDS,
    ("docs/tracking.md", "Switch it on"): COMMANDS,
    ("docs/tracking.md", "Look at it"): COMMANDS,
    ("docs/data.md", "A teacher"): "tests/pipeline/test_pairs.py",
    ("docs/own-base.md", None): "tests/pipeline/test_own_base.py",
}

# A file holds these commands, or all their words, and runs them.
TYPED = {
    r"make (repro|test|\.venv)|apt-get install .*": ".ci/run",
    r"\.ci/(run|full)": ".ci/run",
    r"mathmind audit": ".ci/run",
    r"docker/build cpu|docker/build --(ca|base) .*|docker/build": "tests/containers/conftest.py",
    r"docker/lock( <image>)?( --upgrade PACKAGE)?": "tests/unit/test_locks.py",
    r"mathmind pin( --all| test| test --update| base-model)?": "tests/pipeline/test_hub.py",
    r"dvc repro base-model": "tests/pipeline/test_own_base.py",
    r"mathmind (serve grpo|chat)": "tests/pipeline/test_chat.py",
    r"MATHMIND_API_KEY=\.\.\. mathmind serve grpo --host 0\.0\.0\.0": "tests/pipeline/test_chat.py",
    r"mathmind (score)": "tests/unit/test_score.py",
    r"mathmind repro": "tests/unit/test_repro.py",
    r"mathmind (verify|verify --twice)": "tests/pipeline/test_verify.py",
    r"mathmind join sft|dvc repro sft": "tests/pipeline/test_parallel.py",
    r"mathmind teach": "tests/pipeline/test_pairs.py",
    r"mathmind (publish|publish grpo --to you/name --dry-run)": COMMANDS,
    r"mathmind (report|seeds|seeds --n 3 grpo orpo|doctor)": COMMANDS,
    r"mathmind plots-page": COMMANDS,
    r"mathmind sync": COMMANDS,
    r'eval "\$\(_MATHMIND_COMPLETE=bash_source mathmind\)"': COMMANDS,
    r"make (gsm8k-local FROM=folder|clean)": COMMANDS,
    r"cp params/(report-t4|scratch-gpu)\.yaml params\.yaml": COMMANDS,
    r"dvc plots (show|diff)": COMMANDS,
    r"dvc exp (show|apply slower|remove slower)": COMMANDS,
    r"dvc (gc --workspace|unprotect)|rm -r \.dvc/tmp/mathmind": COMMANDS,
    r"dvc exp run -S (prepare_mix.* too_long=cut|prepare_mix\S+ -S \S+|fetch\.careless=0\.5)": COMMANDS,
    r"dvc (pull|pull --allow-missing|push|push fetch .*|status)|dvc repro grpo && .*|dvc remote add --local --default drive FOLDER": COMMANDS,
    r"dvc (repro|repro --force|repro --force --single-item|metrics diff main|queue start)|git (diff|status)": USES,
    r"dvc exp run -S grpo\.lr=1e-4": USES,
    r"dvc queue start -j 8": EXPERIMENTS,
    r"dvc exp remove": COMMANDS,
}

# What no test types, and why.
NOT_HERE = {
    r"sbatch .*": "hours of GPUs; tests/launch/test_slurm.py runs the file, fetch in it, on a node of its own",
    r"sky launch .*|dvc exp pull mathmind:.*|rsync -a mathmind:.*": "an account with a cloud; tests/launch/test_sky.py has SkyPilot read the task, and runs what it runs",
    r"apptainer build .*|docker save .*|docker/images/.*": "minutes; tests/containers/test_apptainer.py runs what they make",
    r"make images|docker/build (NAME|--index .*|--wheels .*)": "an engine, a mirror: CI builds the cpu image from another base",
    r"docker/audit": "asks a service of advisories; its answers are tested in tests/unit/test_advisories.py",
    r"docker/install \.\./\.venv/rollout rollout": "gigabytes for a CUDA machine; CI installs cpu and host by the same program",
    r"mathmind join sft --node 2": "a third machine",
    r"PYTHON=python3\.12 make repro": "CI's machine has one Python; .ci/full names one so",
    r"pytest -m gpu|export MATHMIND_PYTHON=.*|mathmind repro && mathmind report": "a GPU, with the environment of rollout.lock",
    r"mathmind pin --all && git add .*": "the hub; tests/pipeline/test_hub.py pins from one on loopback",
    r"cp params/X\.yaml params\.yaml|mathmind pin NAME|\. \.venv/bin/activate": "X and NAME stand for others; tests run in that environment",
    r"mathmind seeds --n 3 (base-model|sft qlora grpo orpo)|dvc exp run -S qlora\.max_steps=.*": "hours: the study's own runs",
    r"(python )?benchmarks/.*|python benchmarks/.*": "measurements, which tests never take",
    r"mkdir site .*|python3 -(m venv|c) .*|export PATH=.*|python -m compileall .*|cd repository .*": "a GPU host that is packed for",
    r"(vllm|hf|ollama|llama-server|wandb|uv|tensorboard) .*": "another project's program, with an account, a GPU or a server of its own",
    r"git checkout [0-9a-f]{12,40}": "the commit of the card that docs/card.md shows",
}


def walked() -> list[Command]:
    return [command for page, section in WALKED for command in in_blocks(page, section)]


def is_walked(command: Command) -> bool:
    """As it stands, or as the beginning of what is walked elsewhere: a sentence names a command without all its words."""
    return any(command.text == other.text or f"{other.text} ".startswith(f"{command.text} ") for other in walked())


def rows_for(command: Command, table: dict[str, str]) -> list[str]:
    return [words for words in table if re.fullmatch(words, command.text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_typed_by_a_test_or_says_why_not(page):
    untyped = [command for command in commands_of(page) if not is_walked(command)]
    missing = [str(command) for command in untyped if not rows_for(command, TYPED) and not rows_for(command, NOT_HERE)]
    assert not missing, "type them in tests/pipeline/test_commands.py, or say in NOT_HERE why not:\n" + "\n".join(missing)


def test_the_tests_that_walk_a_page_name_it_and_the_section():
    for (page, section), file in WALKED.items():
        assert in_blocks(page, section), (page, section)
        assert is_named_in(f"walk {page}", file), (page, file)
        assert section is None or is_named_in(f"walk {section}", file), (section, file)


def test_the_tests_that_type_a_command_hold_its_words():
    wrong = []
    for page in PAGES:
        for command in commands_of(page):
            for row in [] if is_walked(command) else rows_for(command, TYPED):
                wrong += [] if is_named_in(command.text, TYPED[row]) else [f"{command}: not in {TYPED[row]}"]
    assert not wrong, "\n".join(wrong)


def test_no_row_is_of_a_command_that_no_page_has():
    everything = [command for page in PAGES for command in commands_of(page)]
    unused = [row for table in (TYPED, NOT_HERE) for row in table if not any(re.fullmatch(row, command.text) for command in everything)]
    assert not unused


def test_a_command_is_found_in_a_block_and_in_a_sentence_with_its_line_and_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.documents.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "# Title\n\nRun `mathmind\nreport`, not `dvc` alone.\n\n```\n$ dvc repro   # all of it\nRunning\n...\nDone\n```\n\n"
        "## Next\n\n```yaml\ndvc: no\n```\n\n    mathmind doctor  # here\n    not one\n",
        encoding="utf-8",
    )
    assert in_blocks("page.md") == (("page.md", 7, "dvc repro", ("Running", "Done")), ("page.md", 19, "mathmind doctor", ()))
    assert in_blocks("page.md", "Next") == in_blocks("page.md")[1:]
    assert in_sentences("page.md") == (("page.md", 3, "mathmind report", ()),)
