"""eval, eval-gguf and compare: every number follows from the predictions that lie beside it."""

import csv
import json

import pytest

from stages.harness.jsonl import read_json, read_rows, write_rows
from stages.scoring.samples import pass_at_k
from stages.scoring.verdicts import judge_all, model_scores

METHODS = {"base": "base", "sft": "merged-sft", "qlora": "merged", "grpo": "merged-grpo", "orpo": "merged-orpo"}


@pytest.fixture(scope="module")
def scored(small):
    for method in ("sft", "grpo", "orpo"):
        small.do("merge", base="base", adapter=method, out=f"merged-{method}")
    for method, model in METHODS.items():
        outs = {"out_metrics": f"metrics/{method}.json", "out_predictions": f"predictions/{method}.jsonl"}
        small.do("eval", model=model, mix="mix", **outs)
    small.do("gguf-export", model="merged", out="gguf-scored")
    small.do("eval-gguf", gguf="gguf-scored", mix="mix", reference="predictions/qlora.jsonl",
             out_metrics="metrics/qlora-gguf.json", out_predictions="predictions/qlora-gguf.jsonl")  # fmt: skip
    small.do("compare", metrics="metrics", predictions="predictions", out_metrics="metrics.json",
             out_comparison="comparison.json", out_plot="pass_at_1.csv")  # fmt: skip
    return small


@pytest.mark.parametrize("method", METHODS)
def test_scores_follow_from_the_predictions_beside_them(scored, method):
    found = read_json(scored / f"metrics/{method}.json")
    predictions, test = (list(read_rows(scored / path)) for path in (f"predictions/{method}.jsonl", "mix/test.jsonl"))
    assert model_scores(judge_all(predictions, test), seed=0) == found["scores"]
    assert read_json(scored / "metrics.json")["models"][method] == found["scores"]
    assert found["scores"]["n"] == len(test) == len(predictions)


def test_the_base_is_scored_as_it_is_asked_best(scored):
    found = read_json(scored / "metrics/base.json")
    assert set(found["prompts"]) == {"chatml", "alpaca", "few_shot"}
    assert found["scores"]["pass_at_1"] == max(scores["pass_at_1"] for scores in found["prompts"].values())
    assert found["prompt"] in found["prompts"]


def test_a_method_is_asked_with_the_template_it_carries(scored):
    assert {read_json(scored / f"metrics/{method}.json")["prompt"] for method in METHODS if method != "base"} == {"own"}


def test_every_form_of_gguf_is_compared_with_the_merged_model(scored):
    forms = read_json(scored / "metrics/qlora-gguf.json")["forms"]
    assert set(forms) == {"f16", "q8_0", "q4_k_m"}
    rows = [row for row in read_rows(scored / "predictions/qlora-gguf.jsonl") if row["form"] == "f16"]
    merged = list(read_rows(scored / "predictions/qlora.jsonl"))
    same = sum(a["completion"] == b["completion"] for a, b in zip(rows, merged, strict=True)) / len(merged)
    assert forms["f16"]["same_text"] == pytest.approx(same) and same >= 0.95


def test_a_form_that_loses_more_than_it_may_stops_the_graph(scored, tmp_path):
    """A merged model that was right on everything stands for a form that lost much."""
    rows = [{**row, "correct": True} for row in read_rows(scored / "predictions/qlora.jsonl")]
    write_rows(scored / "right.jsonl", rows)
    paths = {"out_metrics": "lost.json", "out_predictions": "lost.jsonl"}
    done = scored.run("eval-gguf", gguf="gguf-scored", mix="mix", reference="right.jsonl", **paths)
    assert done.returncode == 2 and not (scored / "lost.json").exists()
    assert "f16.gguf loses" in done.stdout and "eval_gguf.largest_drop.f16 allows (0.0)" in done.stdout
    scored.set_params({"eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None}})
    scored.do("eval-gguf", gguf="gguf-scored", mix="mix", reference="right.jsonl", **paths)
    scored.set_params({})
    wrong = 1 - read_json(scored / "lost.json")["forms"]["f16"]["pass_at_1"]
    assert read_json(scored / "lost.json")["forms"]["f16"]["drop"]["difference"] == pytest.approx(wrong)


def test_samples_beside_the_greedy_answer_give_pass_at_k_and_maj_at_k(scored):
    scored.set_params({"eval.n_samples": 4, "eval.problems": 30})
    paths = {"model": "merged", "mix": "mix", "out_metrics": "sampled.json", "out_predictions": "sampled.jsonl"}
    scored.do("eval", **paths)
    scored.set_params({})
    rows, greedy = (list(read_rows(scored / path)) for path in ("sampled.jsonl", "predictions/qlora.jsonl"))
    assert [row["completion"] for row in rows] == [row["completion"] for row in greedy[:30]]
    assert {len(row["samples"]) for row in rows} == {4}
    assert any(len({sample["completion"] for sample in row["samples"]}) > 1 for row in rows)
    found = read_json(scored / "sampled.json")["samples"]
    correct = [[sample["correct"] for sample in row["samples"]] for row in rows]
    assert found["pass_at_k"] == {str(k): pytest.approx(pass_at_k(correct, k), abs=1e-6) for k in (1, 2, 4)}
    assert found["pass_at_k"]["1"] <= found["pass_at_k"]["2"] <= found["pass_at_k"]["4"]
    assert set(found["maj_at_k"]) == {"1", "2", "4"} and found["maj_at_k"]["1"] == found["pass_at_k"]["1"]


def test_some_test_problems_are_asked_alone_or_told_apart(scored):
    paths = {"model": "merged", "mix": "mix", "out_metrics": "some.json", "out_predictions": "some.jsonl"}
    whole = {row["id"]: row for row in read_rows(scored / "predictions/qlora.jsonl")}
    chosen = [read_row["id"] for place, read_row in enumerate(read_rows(scored / "mix/test.jsonl")) if place in (3, 5, 11)]

    scored.set_params({"eval.problems": [11, 3, 5]})
    scored.do("eval", **paths)
    alone = list(read_rows(scored / "some.jsonl"))
    assert [row["id"] for row in alone] == chosen
    assert [row["completion"] for row in alone] == [whole[name]["completion"] for name in chosen]
    scored.set_params({"eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None}})
    scored.do("eval-gguf", gguf="gguf-scored", mix="mix", reference="some.jsonl", out_metrics="g.json", out_predictions="g.jsonl")
    assert {row["id"] for row in read_rows(scored / "g.jsonl")} == set(chosen)

    scored.set_params({"eval.subset": [11, 3, 5]})
    scored.do("eval", **paths)
    found = read_json(scored / "some.json")
    assert found["scores"]["n"] == len(whole) and found["subset"]["n"] == 3
    assert found["subset"]["pass_at_1"] == pytest.approx(sum(whole[name]["correct"] for name in chosen) / 3, abs=1e-6)

    for changes, sentence in (
        ({"eval.problems": 5, "eval.subset": [11]}, "eval.subset names a place that eval.problems leaves out"),
        ({"eval.problems": [10_000]}, "eval.problems names place 10000 of a test of"),
    ):
        scored.set_params(changes)
        done = scored.run("eval", **paths)
        assert done.returncode == 2 and sentence in done.stdout
    scored.set_params({})


def test_an_engine_that_needs_a_gpu_says_so(scored):
    scored.set_params({"eval.engine": "vllm"})
    done = scored.run("eval", model="merged", mix="mix", out_metrics="no.json", out_predictions="no.jsonl")
    scored.set_params({})
    assert done.returncode == 2 and "the engine vllm needs a CUDA GPU" in done.stdout


def test_metrics_are_mappings_of_numbers_alone(scored):
    def leaves(value):
        if isinstance(value, dict):
            for inner in value.values():
                yield from leaves(inner)
        else:
            yield value

    metrics = read_json(scored / "metrics.json")
    assert set(metrics) == {"models", "pairs"}
    assert all(isinstance(leaf, (int, float)) for leaf in leaves(metrics))
    assert set(metrics["pairs"]["grpo_vs_sft"]) == {"difference", "low", "high", "p", "p_holm"}


def test_a_pairs_difference_is_that_of_its_models(scored):
    metrics = read_json(scored / "metrics.json")
    for name, pair in metrics["pairs"].items():
        first, second = name.split("_vs_")
        gap = metrics["models"][first]["pass_at_1"] - metrics["models"][second]["pass_at_1"]
        assert pair["difference"] == pytest.approx(gap, abs=1e-5)
        assert pair["low"] <= pair["difference"] <= pair["high"] and pair["p"] <= pair["p_holm"] <= 1


def test_the_plot_holds_every_model_once(scored):
    with (scored / "pass_at_1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == list(read_json(scored / "metrics.json")["models"])


def test_a_missing_model_and_an_unknown_pair_are_named(scored, tmp_path):
    import shutil

    paths = {"predictions": "predictions", "out_metrics": "x.json", "out_comparison": "y.json", "out_plot": "z.csv"}
    scored.set_params({"compare.pairs": ["qlora_vs_qrlo"]})
    done = scored.run("compare", metrics="metrics", **paths)
    scored.set_params({})
    assert done.returncode == 2 and "compare.pairs: qlora_vs_qrlo must name two models" in done.stdout
    shutil.copytree(scored / "metrics", scored / "fewer", dirs_exist_ok=True)
    (scored / "fewer/orpo.json").unlink()
    done = scored.run("compare", metrics="fewer", **paths)
    assert done.returncode == 2 and "results/metrics/orpo.json is missing" in done.stdout


def test_a_second_eval_writes_the_same_bytes(scored):
    scored.do("eval", model="merged", mix="mix", out_metrics="again.json", out_predictions="again.jsonl")
    assert (scored / "again.json").read_bytes() == (scored / "metrics/qlora.json").read_bytes()
    assert (scored / "again.jsonl").read_bytes() == (scored / "predictions/qlora.jsonl").read_bytes()
    assert json.loads((scored / "again.json").read_text())["bleu_signature"].startswith("nrefs:1")


def test_the_number_of_processes_changes_no_byte_of_an_evaluation(scored, monkeypatch):
    scored.set_params({"eval.batch_size": 30, "eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None}})
    written = {}
    for workers in ("1", "2", "3"):
        monkeypatch.setitem(scored.environment, "MATHMIND_WORKERS", workers)
        scored.do("eval", model="merged", mix="mix", out_metrics="e.json", out_predictions="e.jsonl")
        scored.do("eval-gguf", gguf="gguf-scored", mix="mix", reference="e.jsonl", out_metrics="g.json", out_predictions="g.jsonl")
        written[workers] = [(scored / name).read_bytes() for name in ("e.json", "e.jsonl", "g.json", "g.jsonl")]
    assert written["1"] == written["2"] == written["3"]
