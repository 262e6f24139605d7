"""What a stage opens is what it declares, and what it writes lies in its scratch folder: seen by strace, in a clone's fetch."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.pipeline.test_launcher import clone, environment, launch  # noqa: F401

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def audited(folder, *options):
    """fetch, and what the audit says of it."""
    traces = folder.parent / "traces"
    traces.mkdir(exist_ok=True)
    assert launch(folder, MATHMIND_TRACE=str(traces)).returncode == 0
    command = [sys.executable, "-m", "stages", "audit", str(traces), *options]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def plant(folder, line):
    """A line at the start of fetch's run."""
    source = folder / "stages/fetch.py"
    text = source.read_text()
    head, found, body = text.partition("def run(")
    signature, colon, rest = body.partition("-> None:\n")
    assert found and colon
    source.write_text(f"{head}{found}{signature}{colon}    {line}\n{rest}")


def test_a_stage_that_keeps_to_its_deps_passes(clone):  # noqa: F811
    done = audited(clone)
    assert done.returncode == 0 and "1 of 28 stages looked at: each read what it declares" in done.stdout, done.stdout


def test_a_program_reads_the_same_as_json(clone):  # noqa: F811
    plant(clone, 'open("README.md").close()')
    done = audited(clone, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["undeclared"] == [{"stage": "fetch", "did": "read", "path": "README.md"}]
    assert found["stages"].pop("fetch") and not any(found["stages"].values())


def test_bytecode_stands_for_its_source(clone):  # noqa: F811
    compiled = [sys.executable, "-m", "compileall", "-q", "stages"]
    subprocess.run(compiled, cwd=clone, check=True)
    assert audited(clone).returncode == 0
    plant(clone, "import stages.scoring.bleu")
    subprocess.run(compiled, cwd=clone, check=True)
    assert "fetch read stages/scoring/__pycache__/bleu." in audited(clone).stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('open("README.md").close()', "fetch read README.md: declare it in dvc.yaml"),
        ('__import__("numpy").fromfile("Makefile", dtype="u1")', "fetch read Makefile: declare it in dvc.yaml"),  # opened by C
        ('open("{outside}", "w").close()', "fetch wrote {outside}: stages write below --scratch alone"),
        ('__import__("os").makedirs("data/planted")', "fetch wrote data/planted: stages write below --scratch alone"),
        ('__import__("os").chmod("Makefile", 0o600)', "fetch wrote Makefile: stages write below --scratch alone"),
        ('__import__("subprocess").run(["cat", "README.md"], stdout=-3)', "fetch read README.md"),
        ('open("a name with \\" and é", "w").close()', 'fetch wrote a name with " and é'),
    ],
)
def test_a_planted_read_or_write_is_named(clone, tmp_path, line, said):  # noqa: F811
    outside = tmp_path / "planted"
    plant(clone, line.format(outside=outside))
    done = audited(clone)
    assert done.returncode == 1 and said.format(outside=outside) in done.stdout, done.stdout


def test_no_trace_is_said_and_not_taken_for_a_clean_one(clone, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "stages", "audit", str(tmp_path)]
    done = subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "holds no trace of a stage" in done.stderr
