"""Both reports say what the run's files say, no more and no less, and whatever a model wrote stays text."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages.__main__ import main
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.host.graph import read_yaml
from stages.host.predictions import CORRECT, CORRECT_FLEXIBLE, NOT_ASKED, PARSED, TRUNCATED
from stages.host.published import PUBLISHED
from stages.host.report import write_reports
from stages.host.seeds import result_keys
from stages.scoring.statistics import wilson
from tests.finished_run import MODELS, NASTY, write_lock, write_run
from tests.imports import ROOT
from tests.pages import Page

COMMITTED = ("metrics.json", "params.yaml", "dvc.lock", "results/comparison.json", "results/plots", "results/timing")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run; tests that change it take a copy."""
    return write_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """The results in git, as a clone has them: without data and predictions."""
    folder = tmp_path_factory.mktemp("committed")
    for name in COMMITTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(params=["made", "committed"])
def finished(request) -> Path:
    return request.getfixturevalue(request.param)


def page_of(folder: Path) -> Page:
    """The page of a folder as it is now."""
    return Page(write_reports(folder)[1].read_text(encoding="utf-8"))


@cache
def page_once(folder: Path) -> Page:
    """The page of a folder that no test changes."""
    return page_of(folder)


def markdown_of(folder: Path) -> list[list[str]]:
    text = (folder / "results/report.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def number(shown: str) -> float:
    return float(shown.replace("−", "-").replace(",", "").rstrip("%"))


def bounds(shown: str) -> list[float]:
    return [number(part) for part in shown.split(" to ")]


def near(figures: list[float]) -> object:
    """As many hundredths, shown with one decimal."""
    return pytest.approx([100 * figure for figure in figures], abs=0.0501)


def test_the_scores_on_the_page_are_those_of_metrics_json(finished):
    metrics = read_json(finished / "metrics.json")["models"]
    rows = page_once(finished).tables["scores"][1:]
    assert len(rows) == len(metrics)
    for row, (name, scores) in zip(rows, metrics.items(), strict=True):
        n, one, interval, flexible, bleu, bleu_interval, unparsed, truncated = row[1:9]
        assert row[0] == name.removesuffix("-gguf") or name.endswith("-gguf") and row[0].endswith(", GGUF")
        assert number(n) == scores["n"]
        found = [number(one), *bounds(interval), number(flexible), number(bleu), *bounds(bleu_interval)]
        shown = "pass_at_1 pass_at_1_low pass_at_1_high pass_at_1_flexible bleu bleu_low bleu_high".split()
        assert found == near([scores[key] for key in shown])
        assert [number(unparsed), number(truncated)] == near([scores["unparsed"], scores["truncated"]])


def test_the_scores_in_the_markdown_are_those_of_metrics_json(finished):
    page_once(finished)
    metrics = read_json(finished / "metrics.json")["models"]
    rows = {row[0]: row for row in markdown_of(finished) if len(row) == 10}
    for name, scores in metrics.items():
        found = [number(rows[name][1]), *bounds(rows[name][2]), number(rows[name][4])]
        assert found == near([scores[key] for key in ("pass_at_1", "pass_at_1_low", "pass_at_1_high", "bleu")])


def test_every_pair_stands_in_the_matrix_both_ways(finished):
    pairs = read_json(finished / "metrics.json")["pairs"]
    header, *rows = page_once(finished).tables["matrix"]
    cells = {(row[0], column): text for row in rows for column, text in zip(header[1:], row[1:], strict=True)}
    tested = 0
    for name, pair in pairs.items():
        first, second = name.split("_vs_")
        for key, sign in (((first, second), 1), ((second, first), -1)):
            difference, low, high, p, verdict = re.fullmatch(
                r"([+−]?[\d.]+) ([+−]?[\d.]+) to ([+−]?[\d.]+) p ([\d.e-]+) (higher|lower|within chance)", cells[key]
            ).groups()
            low_high = sorted((sign * pair["low"], sign * pair["high"]))
            assert [number(difference), number(low), number(high)] == near([sign * pair["difference"], *low_high])
            assert number(p) == pytest.approx(pair["p_holm"], rel=0.06)
            expected = "higher" if sign * pair["difference"] > 0 else "lower"
            assert verdict == ("within chance" if pair["p_holm"] >= 0.05 else expected)
            tested += 1
    assert tested == sum(text not in ("", "not tested") for text in cells.values())


def test_scores_by_steps_and_gains_are_those_of_comparison_json(finished):
    comparison, page = read_json(finished / "results/comparison.json"), page_once(finished)
    shown, gains = page.table("by-steps"), page.table("gains")
    for model in MODELS:
        groups = sorted(comparison["models"][model]["by_steps"].items(), key=lambda group: int(group[0]))
        assert [number(cell) for cell in shown[model]] == near([group["pass_at_1"] for _, group in groups])
    assert list(gains) == [model for model in MODELS if model != "base"]
    for model, row in gains.items():
        whole, *by_steps = comparison["gains"][model].values()
        assert [number(cell) for cell in row[:3]] == near([whole[key] for key in ("pass_at_1", "arithmetic", "form")])
        assert [list(map(number, cell.split())) for cell in row[4:]] == [
            near([part["arithmetic"], part["form"]]) for part in by_steps
        ]


def test_every_gguf_form_is_shown_with_its_size_and_scores(finished):
    about, rows = read_json(finished / "results/comparison.json")["models"], page_once(finished).tables["forms"][1:]
    expected = [
        form
        for model in MODELS
        for form in sorted(about[f"{model}-gguf"]["forms"].values(), key=lambda form: -form["mib"])
    ]
    for row, form in zip(rows, expected, strict=True):
        mib, score, _, lost, interval, same = row[-8:-2]  # counted from the end: the model's cell spans its forms
        assert number(mib) == form["mib"]
        drop = form["drop"]
        assert [number(score), number(same)] == near([form["pass_at_1"], form["same_text"]])
        assert [number(lost), *bounds(interval)] == near([drop["difference"], drop["low"], drop["high"]])


def test_the_reports_figures_stand_beside_with_wilsons_interval_at_100(made):
    rows = page_once(made).table("published")
    assert {name: (row[0], row[2]) for name, row in rows.items()} == {
        "QLoRA": ("41.0", "39.2"), "GRPO": ("53.0", "45.3"), "ORPO": ("49.0", "43.7"),
    }  # fmt: skip
    for theirs in PUBLISHED.values():
        assert bounds(rows[theirs.title][1]) == near(list(wilson(theirs.right, 100)))


@pytest.mark.parametrize(("profile", "said"), [("embedded", True), ("gsm8k-local", True), ("report-h200", False)])
def test_levels_are_said_not_to_compare_unless_the_profile_is_the_reports(copy, profile, said):
    text = (copy / "params.yaml").read_text().replace("profile: embedded", f"profile: {profile}")
    (copy / "params.yaml").write_text(text)
    assert all(("cannot be compared in level" in path.read_text()) is said for path in write_reports(copy))


def test_a_gpus_memory_and_the_scores_of_a_subset_are_shown_where_there_are_any(copy):
    assert not any("on the GPU" in path.read_text() or "eval.subset" in path.read_text() for path in write_reports(copy))
    timing, comparison = copy / "results/timing/qlora.json", copy / "results/comparison.json"
    write_json(timing, {**read_json(timing), "peak_gpu_memory_mib": 13_937})
    found, scores = read_json(comparison), read_json(copy / "metrics.json")["models"]["qlora"]
    found["models"]["qlora"]["subset"] = {**scores, "n": 17, "pass_at_1": 0.352941}
    write_json(comparison, found)
    markdown, html = (path.read_text() for path in sorted(write_reports(copy), key=lambda path: path.suffix, reverse=True))
    assert "| on the GPU |" in markdown and "| 13937 |" in markdown
    assert "qlora on the 17 problems of eval.subset: 35.3%" in markdown and "qlora on the 17 problems of eval.subset" in html
    assert "on the GPU, MiB" in html and "13,937" in html


def test_the_packed_answers_are_the_predictions(made):
    packed = page_once(made).packed()
    names = [" ".join(filter(None, (model["name"], model["form"]))) for model in packed["models"]]
    assert names[:5] == list(MODELS) and len(names) == 5 + 15
    for name, answers in zip(names, packed["answers"], strict=True):
        model, _, form = name.partition(" ")
        rows = read_rows(made / f"results/predictions/{model}{'-gguf' if form else ''}.jsonl")
        rows = {row["id"]: row for row in rows if row.get("form", "") == form}
        for place, id in enumerate(packed["ids"]):
            if id not in rows:
                assert answers["text"][place] == NOT_ASKED
                continue
            row, verdict = rows[id], answers["verdict"][place]
            assert packed["texts"][place][answers["text"][place]] == row["completion"]
            assert answers["declared"][place] == row["answer"] and answers["tokens"][place] == row["tokens"]
            assert bool(verdict & CORRECT) == row["correct"]
            assert bool(verdict & CORRECT_FLEXIBLE) == row["correct_flexible"]
            assert bool(verdict & TRUNCATED) == (row["finish_reason"] == "length")


def test_the_packed_verdicts_add_up_to_metrics_json(made):
    packed, metrics = page_once(made).packed(), read_json(made / "metrics.json")["models"]
    for model, answers in zip(packed["models"][:5], packed["answers"][:5], strict=True):
        scores, verdicts = metrics[model["name"]], answers["verdict"]
        assert sum(bool(verdict & CORRECT) for verdict in verdicts) == round(scores["pass_at_1"] * scores["n"])
        assert sum(not verdict & PARSED for verdict in verdicts) == round(scores["unparsed"] * scores["n"])


def test_what_models_and_files_say_is_text_and_never_markup(copy):
    params = (copy / "params.yaml").read_text().replace("run:  # how", f"run:  # </pre>{NASTY.splitlines()[0]} how")
    (copy / "params.yaml").write_text(params)
    found = {"rows": 1, "dropped": 1, "examples": [{"id": NASTY, "text": NASTY}], "like": {NASTY: NASTY}}
    write_json(copy / "data/mix/account.json", {NASTY: {"read": 1, "findings": {NASTY: found}, "train": 0}})
    record = read_json(copy / "results/timing/grpo.json")
    write_json(copy / "results/timing/grpo.json", {**record, "machine": {"cpu": NASTY}})
    page = page_of(copy)
    assert page.packed()["texts"][0][0].endswith(NASTY) and any(NASTY in text for text in page.packed()["texts"][0][2:])
    assert [attributes["type"] for attributes in page.named("script")] == ["application/gzip", "module"]
    assert not page.named("img") and "onerror" in page.words
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_allows_only_its_own_style_and_script_and_names_no_other_file(made):
    page = page_once(made)
    policy = next(attributes["content"] for attributes in page.named("meta") if "http-equiv" in attributes)
    html = (made / "results/report.html").read_text(encoding="utf-8")
    for kind, opening, closing in (("style", "<style>", "</style>"), ("script", '<script type="module">', "</script>")):
        text = html.partition(opening)[2].partition(closing)[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    loading = {"src", "srcset", "data", "action", "poster", "style"}
    assert not [attributes for _, attributes in page.elements if loading & attributes.keys()]
    assert all(link["href"].startswith("#") for link in page.named("a")) and not page.named("link")
    assert not re.search(r"https?://|@import|url\(", html.replace(page.texts["packed"], ""))


def test_the_page_says_where_the_data_is_from_and_what_was_found_in_it(made):
    page = page_once(made)
    assert page.table("sources") == {
        "reasoning": ["team/maths at aaaaaaaaaaaa", "90", "cc-by-4.0 (terms to accept first)"],
        "test": ["made here by the generator", "60", ""],
    }
    assert page.table("rows-prepare-mix") == {"qlora": ["90", "7", "83", "73", "10"], "test": ["60", "", "", "", ""]}
    found = [row[1:4] for row in page.tables["findings-prepare-mix"][1:]]
    assert found == [["too long", "7", "7"], ["shares words with the test", "2", "0"]]
    assert "x-1, like test-000001: What is 2+2?" in page.words
    assert "findings-preference-pairs" not in page.tables
    assert "The chosen answer is the longer one in 4.0% of the pairs" in page.texts["lengths-pairs"]
    report = (made / "results/report.md").read_text(encoding="utf-8")
    assert "| prepare-mix | qlora | 90 | 7 | 83 | 73 | 10 | too long (7, 7); shares words with the test (2, 0) |" in report


def test_every_link_of_the_page_leads_to_a_section(made):
    page = page_once(made)
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    assert len(page.named("a")) >= 9 and all(link["href"][1:] in ids for link in page.named("a"))


def test_without_predictions_the_page_says_what_brings_them_and_shows_the_rest(committed):
    page = page_once(committed)
    assert "dvc pull" in page.texts["missing"] and "dvc repro" in page.texts["missing"]
    assert "data/mix/account.json is not here" in page.words
    assert not page.named("script") and len(page.tables["scores"]) == 11


def test_answers_that_are_there_are_shown_beside_the_name_of_one_that_is_not(copy):
    (copy / "results/predictions/orpo.jsonl").unlink()
    page = page_of(copy)
    assert "Not here: results/predictions/orpo.jsonl." in page.texts["missing"]
    assert "orpo" not in [model["name"] for model in page.packed()["models"] if not model["form"]]


def test_answers_without_their_questions_are_not_shown(copy):
    shutil.rmtree(copy / "data")
    page = page_of(copy)
    assert "data/mix/test.jsonl" in page.texts["missing"] and not page.named("script")


def test_answers_to_other_problems_are_refused_by_name(copy):
    file = copy / "results/predictions/qlora.jsonl"
    write_rows(file, [{**row, "id": f"other-{row['id']}"} for row in read_rows(file)])
    with pytest.raises(InputError, match=r"predictions/qlora\.jsonl answers 'other-test-000000', which .* lacks: run"):
        write_reports(copy)


def test_the_time_of_another_run_is_dropped_and_said(copy):
    record = copy / "results/timing/grpo.json"
    write_json(record, {**read_json(record), "key": "f" * 16, "seconds": 98765.4})
    page, markdown = page_of(copy), (copy / "results/report.md").read_text(encoding="utf-8")
    for text in (page.words, markdown):
        assert "No record of the run that dvc.lock holds: grpo." in text
        assert "98765" not in text and "98,765" not in text
    assert page.table("scores")["grpo"][8] == "" and page.table("scores")["qlora"][8] != ""
    assert page.table("runs")["grpo"][1] == "no record of this run"


def test_results_and_parameters_that_are_not_the_locks_are_named(copy):
    assert "mixes runs" not in page_of(copy).words
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("max_completion: 80", "max_completion: 81"))
    rows = list(read_rows(copy / "results/predictions/sft.jsonl"))
    write_rows(copy / "results/predictions/sft.jsonl", [{**row, "tokens": 1} for row in rows])
    said = "Not as dvc.lock holds them: results/predictions/sft.jsonl, params.yaml: grpo."
    page = page_of(copy)
    assert said in page.words and said in (copy / "results/report.md").read_text()


def test_a_fact_that_differs_between_stages_stands_once_for_each_value(made):
    rows = page_once(made).tables["facts"]
    assert ["engine", "native", "all 28 runs"] in rows
    assert ["NO", "grpo"] in rows


def test_every_parameter_stands_on_the_page_as_written(made):
    words = page_once(made).words
    text = (made / "params.yaml").read_text()
    sections = text[text.index("profile:") :]
    assert all(line.rstrip() in words for line in sections.splitlines())


def test_an_absent_column_is_no_panel_and_an_absent_curve_no_loss(copy):
    shown = {figure["aria-label"] for figure in page_of(copy).named("svg") if "aria-label" in figure}
    assert {"grpo, entropy", "grpo, match format exactly", "grpo, groups with one reward", "qlora, loss"} <= shown
    assert not [label for label in shown if "KL" in label]
    curve = (copy / "results/plots/grpo.csv").read_text().replace("entropy", "kl", 1)
    (copy / "results/plots/grpo.csv").write_text(curve)
    (copy / "results/plots/qlora.csv").unlink()
    shown = {figure["aria-label"] for figure in page_of(copy).named("svg") if "aria-label" in figure}
    assert "grpo, divergence from the start (KL)" in shown and not {"grpo, entropy", "qlora, loss"} & shown


def test_a_run_without_any_curve_has_a_page(copy):
    shutil.rmtree(copy / "results/plots")
    assert "There is no curve in results/plots." in page_of(copy).words


def test_scores_of_several_answers_are_shown_where_a_run_has_them(copy):
    assert "samples" not in page_of(copy).tables
    comparison = read_json(copy / "results/comparison.json")
    shares = {"1": 0.25, "2": 0.5, "4": 0.75}
    for model in MODELS:
        drawn = {"n_samples": 4, "temperature": 0.8, "pass_at_k": shares, "maj_at_k": {**shares, "4": 0.625}}
        comparison["models"][model]["samples"] = drawn
    write_json(copy / "results/comparison.json", comparison)
    page = page_of(copy)
    assert page.table("samples")["qlora"] == ["25.0", "50.0", "75.0", "25.0", "50.0", "62.5"]
    assert "4 answers drawn at temperature 0.8" in page.words


def test_runs_of_the_same_recipe_under_other_seeds_show_their_spread(copy):
    metrics = read_json(copy / "metrics.json")
    models, pairs = metrics["models"], metrics["pairs"]
    own, results = models["grpo"]["pass_at_1"], result_keys(read_yaml(copy / "dvc.lock"))["grpo"]
    theirs = {"models": {**models, "grpo": {"pass_at_1": own + 0.1}},
              "pairs": {**pairs, "grpo_vs_sft": {"difference": 0.125, "p": 0.001, "p_holm": 0.002}}}  # fmt: skip
    ended = {"stage": "grpo", "seed": 1, "recipe": "an image ago", "results": results, **theirs}
    runs = {"a": ended, "b": {**ended, "models": None, "pairs": None}, "c": {**ended, "results": "of another recipe"}}
    write_json(copy / "results/seeds.json", runs)
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)  # where seeds look for the runs that ended
    page = page_of(copy)
    spread, (moved,) = page.tables["seeds"][1:], page.tables["seed-pairs"][1:]
    assert moved[:2] == ["grpo", "grpo against sft"] and moved[3].startswith("+12.5 p 0.002"), moved
    assert [number(moved[2].split()[0])] == near([pairs["grpo_vs_sft"]["difference"]])
    assert len(spread) == 1, "another seed of grpo moves grpo alone"
    assert spread[0][:3] == ["grpo", "grpo", "2"] and spread[0][-1] == "1"
    assert [number(spread[0][3]), number(spread[0][4]), *bounds(spread[0][5])] == near(
        [own, own + 0.05, own, own + 0.1]
    )


def test_steps_stand_in_the_order_of_numbers(copy):
    comparison = read_json(copy / "results/comparison.json")
    for about in comparison["models"].values():
        if "by_steps" in about:
            about["by_steps"] |= {"10": {"pass_at_1": 0.5, "n": 4}}
    write_json(copy / "results/comparison.json", comparison)
    assert page_of(copy).tables["by-steps"][0][1:] == ["1 step", "2 steps", "3 steps", "4 steps", "10 steps"]


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(made, copy):
    ours, theirs = ([path.read_bytes() for path in write_reports(folder)] for folder in (made, copy))
    assert ours == theirs
    for name in (str(ROOT), str(made), str(Path.home() / "")):
        assert not any(name.encode() in text for text in ours)


def test_a_page_of_five_models_and_gsm8ks_1319_problems_is_under_3_mb(tmp_path):
    write_run(tmp_path, problems=1319, words=170, gguf_problems=100)
    assert write_reports(tmp_path)[1].stat().st_size < 3_000_000


def test_mathmind_report_names_both_files(copy, monkeypatch):
    monkeypatch.chdir(copy)
    done = CliRunner().invoke(main, ["report"])
    assert (done.exit_code, done.output) == (0, "wrote results/report.md\nwrote results/report.html\n")


def test_a_report_without_a_lock_is_refused(copy):
    (copy / "dvc.lock").unlink()
    with pytest.raises(InputError, match="dvc.lock is missing or empty: run `dvc repro` first"):
        write_reports(copy)


def test_a_run_of_the_lock_alone_is_not_mixed(copy):
    (copy / "params.yaml").write_text((copy / "params.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert "params.yaml: seed" in page_of(copy).words
    write_lock(copy)
    assert "mixes runs" not in page_of(copy).words


def test_the_script_and_python_mean_the_same_bits():
    script = (ROOT / "stages/host/page/report.js").read_text(encoding="utf-8")
    named = dict(re.findall(r"(\w+) = (-?\d+)[,;]", script))
    for name in ("CORRECT", "CORRECT_FLEXIBLE", "PARSED", "TRUNCATED", "NOT_ASKED"):
        assert json.loads(named[name]) == globals()[name]
