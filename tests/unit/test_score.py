"""`mathmind score`: what a user sees of two files of rows."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from stages.__main__ import main
from stages.harness.jsonl import read_rows, write_rows
from stages.scoring.statistics import paired_difference
from stages.scoring.verdicts import by_steps, judge_all, model_scores
from tests.imports import ROOT

GOLD = [{"question": "?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(40)]


def completions(right: set[int]) -> list[dict]:
    return [{"id": n, "completion": f"so\n#### {n + 1 if n in right else -1}"} for n in range(40)]


@pytest.fixture
def files(tmp_path):
    """A gold file and two prediction files: one right on 30, one on 20 of them."""
    write_rows(tmp_path / "gold.jsonl", GOLD)
    write_rows(tmp_path / "a.jsonl", completions(set(range(30))))
    write_rows(tmp_path / "b.jsonl", completions(set(range(20))))
    return tmp_path


def score(files, *names, **more):
    arguments = [part for name in names for part in ("--predictions", str(files / name))]
    arguments += [part for option, value in more.items() for part in (f"--{option}", *([value] if value else []))]
    return CliRunner().invoke(main, ["score", "--gold", str(files / "gold.jsonl"), *arguments])


def test_one_file_gives_a_models_object_its_steps_and_the_signature(files):
    printed = json.loads(score(files, "a.jsonl", json=None).stdout)
    rows = completions(set(range(30)))
    assert printed.pop("bleu_signature").startswith("nrefs:1|")
    assert printed.pop("by_steps") == by_steps(judge_all(rows, GOLD))
    assert printed == model_scores(judge_all(rows, GOLD), seed=0)
    assert printed["pass_at_1"] == 0.75


def test_two_files_are_tested_in_pairs(files):
    printed = json.loads(score(files, "a.jsonl", "b.jsonl", json=None).stdout)
    assert [model["pass_at_1"] for model in printed["models"].values()] == [0.75, 0.5]
    expected = paired_difference([n < 30 for n in range(40)], [n < 20 for n in range(40)])
    assert printed["pair"] == pytest.approx(expected, rel=1e-5)


def test_the_table_says_the_same(files):
    shown = score(files, "a.jsonl", "b.jsonl").stdout
    assert "75.0%" in shown and "50.0%" in shown and "75.0% of 40" in shown and "difference +25.0 points" in shown


def test_rows_gives_each_verdict_by_the_predictions_id(files):
    assert score(files, "b.jsonl", rows=str(files / "rows.jsonl")).exit_code == 0
    rows = list(read_rows(files / "rows.jsonl"))
    assert rows[0] == {"id": 0, "answer": "1", "correct": True, "correct_flexible": True}
    assert [row["id"] for row in rows] == list(range(40)) and sum(row["correct"] for row in rows) == 20


def test_rows_without_ids_go_by_their_number(files):
    write_rows(files / "c.jsonl", ({"completion": row["completion"]} for row in completions({7})))
    score(files, "c.jsonl", rows=str(files / "rows.jsonl"))
    assert [row["id"] for row in read_rows(files / "rows.jsonl") if row["correct"]] == [7]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (completions({1})[:39], "39 predictions for 40 gold rows"),
        ([*completions({1})[:39], {"id": 39, "text": "5"}], "prediction row 40: 'completion' is missing"),
        ([*completions({1})[:39], {"id": 0, "completion": "5"}], "prediction row 40: id 0 has come before"),
        ([], "there are no predictions"),
    ],
)
def test_bad_predictions_get_one_sentence_that_names_the_file(files, rows, sentence):
    write_rows(files / "bad.jsonl", rows)
    done = score(files, "bad.jsonl")
    assert done.exit_code == 2 and "bad.jsonl" in done.stderr and sentence in done.stderr and not done.stdout


def test_a_line_that_is_not_json_is_named(files):
    (files / "bad.jsonl").write_text('{"completion": "1"}\n{oops\n')
    done = score(files, "bad.jsonl")
    assert done.exit_code == 2 and "bad.jsonl, line 2: not JSON" in done.stderr


@pytest.mark.parametrize(
    ("names", "more"),
    [(["a.jsonl", "a.jsonl"], {}), (["a.jsonl", "b.jsonl"], {"rows": "r.jsonl"}), (["missing.jsonl"], {}), ([], {})],
)
def test_what_cannot_be_asked_is_refused(files, names, more):
    assert score(files, *names, **more).exit_code == 2


def test_scoring_imports_neither_torch_nor_scipy():
    code = (
        "import sys; from stages.__main__ import main; from stages.host import score; main(['score', '--help'], "
        "standalone_mode=False); print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "transformers", "pandas"} & set(modules.stdout.split())
