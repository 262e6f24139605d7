"""The profiles: params.yaml is one of them, all have the same keys, and report-t4 is the report's recipe, value for value."""

import re

import pytest
from ruamel.yaml import YAML

from tests.imports import ROOT

PROFILES = ("embedded", "gsm8k-local", "scratch-gpu", "report-t4", "report-h200")

# What the report gives (its text and its notebooks' settings), by our names. `lora.rank` and the like stand inside a mapping.
REPORT = {
    "base_model": {"repo": "Qwen/Qwen1.5-4B"},
    "prepare_mix": {"chat_share": 0.25, "validation_share": 0.2, "sft_rows": 1000, "grpo_reasoning_rows": 1000},
    "preference_pairs": {"origin": "dataset", "max_tokens": 2048, "max_prompt_tokens": 1024, "max_answer_tokens": 1024},
    "sft": {"precision": "fp16", "lora.rank": 16, "lr": 2e-4, "max_steps": -1, "epochs": 1.0, "max_length": 2048},
    "qlora": {
        "precision": "fp16", "lora.rank": 32, "scheduler": "cosine", "warmup_ratio": 0.01, "optimizer": "paged_adamw_8bit",
        "per_device_batch": 2, "accumulation": 4, "max_steps": -1, "epochs": 3.0, "gradient_checkpointing": True,
        "log_every": 100, "save_every": 1200, "eval_every": 600, "early_stopping_patience": 5, "max_length": 2048,
    },
    "grpo": {
        "precision": "fp16", "lr": 5e-6, "scheduler": "linear", "optimizer": "adamw_8bit", "accumulation": 16, "max_steps": 100,
        "per_device_batch": 1, "prompts_per_step": 4, "generations": 4, "answer_reward": "graded", "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "min_p": 0.1, "rollouts.engine": "vllm",
    },
    "orpo": {
        "precision": "fp16", "scheduler": "linear", "optimizer": "adamw_8bit", "per_device_batch": 2, "accumulation": 4,
        "max_steps": -1, "epochs": 1.0, "beta": 0.1, "max_length": 2048,
    },
}  # fmt: skip
TRAINING = ("sft", "qlora", "grpo", "orpo")


def profile(name):
    return YAML(typ="safe").load((ROOT / "params" / f"{name}.yaml").read_text(encoding="utf-8"))


def keys(values, above=""):
    for name, value in values.items():
        yield above + str(name)
        if isinstance(value, dict) and name not in ("sources", "steps", "pretraining_steps", "columns", "packed"):
            yield from keys(value, f"{above}{name}.")


@pytest.mark.parametrize("name", PROFILES)
def test_all_profiles_have_the_same_keys_in_the_same_order(name):
    assert list(keys(profile(name))) == list(keys(profile("embedded")))
    assert profile(name)["profile"] == name


@pytest.mark.parametrize(("section", "name", "value"), [(s, n, v) for s, given in REPORT.items() for n, v in given.items()])
def test_report_t4_has_the_reports_value(section, name, value):
    found = profile("report-t4")[section]
    for part in name.split("."):
        found = found[part]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["report-t4", "report-h200"])
@pytest.mark.parametrize("section", TRAINING)
def test_what_the_report_does_not_give_is_marked(name, section):
    text = (ROOT / "params" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = re.search(rf"^{section}:\n((?:  .*\n)+)", text, re.MULTILINE)[1].splitlines()
    given = {key.split(".")[0] for key in REPORT[section]}
    unmarked = [line for line in lines if line.split(":")[0].strip() not in given and "not in the report" not in line]
    assert unmarked == []


@pytest.mark.parametrize("section", TRAINING)
def test_report_h200_is_the_same_recipe(section):
    """The same rows go into each update and as many updates are taken; how the hardware is used may differ."""
    theirs, ours = profile("report-t4")[section], profile("report-h200")[section]
    used = {"precision", "per_device_batch", "accumulation", "gradient_checkpointing", "rollouts", "backend", "strict", "nf4", "packed"}
    assert {name for name in theirs if theirs[name] != ours[name]} <= used
    batch = [values["per_device_batch"] * values["accumulation"] for values in (theirs, ours)]
    assert batch[0] == batch[1]


def test_the_reports_hundred_are_asked_alone_on_a_t4_and_told_apart_on_an_h200():
    asked, apart = profile("report-t4")["eval"]["problems"], profile("report-h200")["eval"]["subset"]
    assert asked == apart == sorted(set(asked)) and len(asked) == 100 and 0 <= asked[0] and asked[-1] < 1319
    assert profile("report-h200")["eval"]["problems"] is None
