"""A working folder as a finished run leaves it, in a second: answers drawn by chance, judged and compared by our code.

The answers are as hard to compress as real ones: one model's shrink to a third under gzip, as GSM8K's solutions do, and
54% of their words stand in runs of three that another model's answer to the problem holds too. Of qlora's in the
embedded run, 65% did.
"""

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages import compare
from stages.harness.jsonl import write_json, write_rows
from stages.harness.params import read_params
from stages.host.graph import entry_key, lock_stages, read_graph
from stages.scoring.answers import gold_answer
from stages.scoring.statistics import paired_difference, wilson
from stages.scoring.verdicts import Judged, by_steps, judge, judge_all
from tests.imports import ROOT

MODELS = ("base", "sft", "qlora", "grpo", "orpo")
FORMS = ("f16", "q4_k_m", "q8_0")
NASTY = "</script><img src=x onerror=alert(1)><!--<script>alert(2)</script>\u2028{{ 7 * 7 }} & \"'"
REWARDS = ("check_final_answer", "match_format_exactly")


def write_run(folder: Path, problems: int = 60, words: int = 30, gguf_problems: int = 20, seed: int = 1) -> Path:
    """Writes params.yaml, dvc.lock, data/, metrics.json and results/ below `folder`, and returns it.

    Every completion has so many words, `words` = 170 being about 300 tokens and 1 kB. The first problem and its answers
    carry NASTY, which no page may take for markup.
    """
    chance = random.Random(seed)
    vocabulary = _vocabulary(chance)
    shared = [_drawn(chance, vocabulary, words) for _ in range(problems)]
    test = [_problem(chance, vocabulary, number) for number in range(problems)]
    test[0]["question"] += NASTY
    write_rows(folder / "data/mix/test.jsonl", test)
    write_json(folder / "data/raw/sources.json", {
        "reasoning": {"kind": "hub", "rows": 90, "repo": "team/maths", "revision": 40 * "a", "license": "cc-by-4.0", "gated": "auto"},
        "test": {"kind": "generator", "rows": problems, "revision": None},
    })  # fmt: skip
    long = {"rows": 7, "dropped": 7, "examples": [{"id": "reasoning-000003", "text": "How long is a river?"}], "like": {}}
    again = {"rows": 2, "dropped": 0, "examples": [{"id": "x-1", "text": "What is 2+2?"}], "like": {"x-1": "test-000001"}}
    mix = {"read": 90, "kept": 83, "findings": {"too long": long, "shares words with the test": again}, "train": 73, "validation": 10}
    write_json(folder / "data/mix/account.json", {"qlora": mix, "test": {"rows": problems}})
    lengths = {"chosen": {"mean": 28.1, "median": 26.0}, "rejected": {"mean": 29.2, "median": 27.0}, "chosen_longer": 0.04, "auc": 0.41}
    pairs = {"read": 19, "kept": 19, "findings": {}, "train": 18, "validation": 1, "lengths": lengths}
    write_json(folder / "data/pairs/account.json", {"pairs": pairs})

    results = folder / "results"
    for place, model in enumerate(MODELS):
        texts = [" ".join(_answer(chance, vocabulary, stock)) for stock in shared]
        rows = [_prediction(chance, row, text, 0.2 + 0.15 * place) for row, text in zip(test, texts, strict=True)]
        write_rows(results / f"predictions/{model}.jsonl", rows)
        asked_as = ("chatml", "few_shot") if model == "base" else ("own",)
        judged = judge_all(rows, test)
        prompts = {name: _scores(chance, judged) for name in asked_as}
        prompt = asked_as[-1]
        write_json(results / f"metrics/{model}.json", {
            "prompt": prompt, "scores": prompts[prompt], "by_steps": by_steps(judged), "prompts": prompts,
            "bleu_signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        })  # fmt: skip
        _write_gguf(chance, results, model, rows[:gguf_problems], test[:gguf_problems])
    _write_curves(chance, results / "plots")

    params = read_params(ROOT / "params/embedded.yaml")
    compare.run(
        compare.Params(**params["compare"]),
        metrics=results / "metrics", predictions=results / "predictions", out_metrics=folder / "metrics.json",
        out_comparison=results / "comparison.json", out_plot=results / "plots/pass_at_1.csv",
    )  # fmt: skip
    shutil.copy(ROOT / "params/embedded.yaml", folder / "params.yaml")
    write_lock(folder)
    return folder


def write_lock(folder: Path) -> None:
    """Writes a dvc.lock that holds what lies below `folder`, and a timing record of each of its runs."""
    params = read_params(folder / "params.yaml")
    entries = {}
    for name, stage in read_graph(ROOT, params).items():
        outs = [{"path": path, "md5": _md5(folder / path)} for path in stage.outs if (folder / path).is_file()]
        used = {"params.yaml": {section: params[section] for section in stage.params}}
        entries[name] = {"cmd": stage.command, "deps": [], "params": used, "outs": outs}
    with (folder / "dvc.lock").open("w", encoding="utf-8") as file:
        YAML().dump({"schema": "2.0", "stages": entries}, file)
    for number, (name, entry) in enumerate(lock_stages(folder).items()):
        write_json(folder / f"results/timing/{name}.json", {
            "stage": name, "key": entry_key(entry), "seconds": 1.25 * number, "peak_memory_mib": 100 + number,
            "tokens": 1000, "tokens_per_second": 800, "engine": "native", "image": "cpu", "recipe": "0123456789abcdef",
            "pinned": name != "grpo", "level": "bitwise", "python": "3.11.7", "machine": {"cpu": "a processor"},
        })  # fmt: skip


def _vocabulary(chance: random.Random) -> list[str]:
    """Three thousand words to be drawn by rank, so that texts shrink under gzip as real solutions do, or less."""
    syllables = [a + b + c for a in "bcdfghlmnprst" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    return ["".join(chance.choices(syllables, k=chance.choice((1, 1, 2, 2, 3)))) for _ in range(3000)]


def _drawn(chance: random.Random, vocabulary: list[str], count: int) -> list[str]:
    """Words whose frequency falls with their rank, as in a language (Zipf's law)."""
    return [vocabulary[int(len(vocabulary) ** chance.random()) - 1] for _ in range(count)]


def _problem(chance: random.Random, vocabulary: list[str], number: int) -> dict[str, Any]:
    steps, value = chance.randint(1, 4), chance.randint(2, 900)
    lines = [" ".join(_drawn(chance, vocabulary, 8)) for _ in range(steps)]
    working = "\n".join(f"{line} 2*{k}=<<2*{k}={2 * k}>>{2 * k}" for k, line in enumerate(lines))
    question = " ".join(_drawn(chance, vocabulary, 45)).capitalize() + "?"
    return {"id": f"test-{number:06d}", "question": question, "answer": f"{working}\n#### {value}", "steps": steps}


def _answer(chance: random.Random, vocabulary: list[str], stock: list[str]) -> list[str]:
    """As many words as `stock`: runs of three to six from it, new words, and numbers."""
    words: list[str] = []
    while len(words) < len(stock):
        if chance.random() < 0.3:
            start = chance.randrange(len(stock))
            words += stock[start : start + chance.randint(3, 6)]
        else:
            words += [str(chance.randint(2, 999))] if chance.random() < 0.25 else _drawn(chance, vocabulary, 1)
    return words[: len(stock)]


def _prediction(chance: random.Random, row: dict[str, Any], text: str, skill: float) -> dict[str, Any]:
    """One answer: right with probability `skill`; now and then undeclared, no number, or cut off."""
    gold = gold_answer(row["answer"])
    text += NASTY if row["id"] == "test-000000" else ""
    kinds = {"right": skill, "wrong": 0.9 - skill, "silent": 0.04, "no number": 0.03, "cut off": 0.03}
    kind = chance.choices(list(kinds), list(kinds.values()))[0]
    text += {"right": f"\n#### {gold}", "wrong": f"\n#### {gold + 1}", "no number": "\n\\boxed{many}"}.get(kind, "")
    verdict = judge(text, gold)
    return {
        "id": row["id"], "prompt": "own", "prompt_sha256": "0" * 16, "completion": text, "answer": verdict.answer,
        "correct": verdict.correct, "correct_flexible": verdict.correct_flexible,
        "finish_reason": "length" if kind == "cut off" else "stop", "tokens": len(text) // 4,
    }  # fmt: skip


def _scores(chance: random.Random, judged: Judged) -> dict[str, Any]:
    """A model's object in metrics.json; BLEU alone is made up, as it would take seconds."""
    n, right, bleu = len(judged.verdicts), sum(judged.correct()), chance.uniform(0.2, 0.7)
    low, high = wilson(right, n)
    return {
        "pass_at_1": right / n, "pass_at_1_low": low, "pass_at_1_high": high,
        "pass_at_1_flexible": sum(verdict.correct_flexible for verdict in judged.verdicts) / n,
        "bleu": bleu, "bleu_low": bleu - 0.02, "bleu_high": bleu + 0.03, "bleu_raw": bleu / 2,
        "unparsed": sum(not verdict.parsed for verdict in judged.verdicts) / n,
        "truncated": sum(row["finish_reason"] == "length" for row in judged.predictions) / n, "n": n,
    }  # fmt: skip


def _write_gguf(chance: random.Random, results: Path, model: str, rows: list[dict], test: list[dict]) -> None:
    """The forms' answers: the merged model's text, but for some that the smaller forms get wrong."""
    answers = {form: [{**row, "form": form} for row in rows] for form in FORMS}
    for row in answers["q4_k_m"][1::3]:
        row |= {"completion": row["completion"].partition("####")[0], "answer": None, "correct": False}
    write_rows(results / f"predictions/{model}-gguf.jsonl", [row for form in FORMS for row in answers[form]])
    judged = {form: judge_all(answers[form], test) for form in FORMS}
    scores = {form: _scores(chance, judged[form]) for form in FORMS}
    merged = [row["correct"] for row in rows]
    forms = {
        form: {
            "pass_at_1": scores[form]["pass_at_1"],
            "drop": paired_difference(merged, judged[form].correct()),
            "same_text": 1.0 - 0.3 * place,
            "n": len(rows),
            "mib": 2.0 - 0.5 * place,
            "tensors": {"F32": 16, "Q8_0": 22},
        }
        for place, form in enumerate(FORMS)
    }
    found = {"prompt": "own", "form": "q8_0", "scores": scores["q8_0"], "forms": forms}
    write_json(results / f"metrics/{model}-gguf.json", found)


def _write_curves(chance: random.Random, plots: Path) -> None:
    plots.mkdir(parents=True, exist_ok=True)
    columns = {stage: ["loss"] for stage in ("base-model", "sft", "orpo")}
    columns["qlora"] = ["loss", "eval_loss"]
    columns["grpo"] = [
        "loss", "reward", "completions.clipped_ratio", "completions.mean_length", "entropy", "frac_reward_zero_std",
        *(f"rewards.{name}.{kind}" for name in REWARDS for kind in ("mean", "std")),
    ]  # fmt: skip
    for stage, names in columns.items():
        rows = [",".join(["step", *names])]
        rows += [",".join([str(step), *(f"{chance.random():.6g}" for _ in names)]) for step in range(1, 41)]
        (plots / f"{stage}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
