"""The methods, trained for real at a small size: what is trained, that it changes, and that it comes out the same."""

import csv
import hashlib
import json
import shutil
import signal
import time

import pytest

from stages.corpus.marks import TEXT_END, TURN_END
from stages.harness.jsonl import read_rows
from stages.host.run_files import live_rows
from stages.training.checkpoints import SEAL
from stages.training.curves import Curve
from tests.imports import ROOT
from tests.pipeline.conftest import flip

REWARDS = ("match_format_exactly", "match_format_approximately", "check_exact_answer")


def curve(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mix_files(place):
    """The supervised files of the small run and, where the graph has run here, of the graph."""
    for folder in (place / "mix", ROOT / "data" / "mix"):
        for method in ("qlora", "sft"):
            for part in ("train", "validation"):
                if (file := folder / method / f"{part}.jsonl").is_file():
                    yield file


def test_the_last_trained_label_of_every_row_is_the_stop_token_and_the_prompt_is_not_trained(small):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small / "base")
    stop = tokenizer.convert_tokens_to_ids(TURN_END)
    checked = 0
    for file in mix_files(small):
        template = (file.parent / "chat_template.jinja").read_text(encoding="utf-8")
        for row in read_rows(file):
            encoded = tokenizer.apply_chat_template(
                row["messages"], chat_template=template, return_assistant_tokens_mask=True, return_dict=True
            )
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
            trained = [token for token, keep in zip(ids, mask) if keep]
            assert trained[-1] == stop, row
            assert tokenizer.decode(trained[:-1]) == row["messages"][-1]["content"]
            checked += 1
    assert checked > 300


def test_the_trainer_trains_what_the_marks_say_and_never_padding(small):
    """The batch that trl itself makes of the prepared rows, padding included."""
    from trl import SFTConfig, SFTTrainer

    from stages.training.models import Transformers, load_tokenizer
    from stages.training.trainer import dataset

    tokenizer = load_tokenizer(small / "base", small / "mix" / "sft" / "chat_template.jinja", ends_with=TURN_END)
    rows = dataset(small / "mix" / "sft" / "train.jsonl", ("messages",))
    config = SFTConfig(output_dir=str(small / "unused"), assistant_only_loss=True, use_cpu=True, bf16=False,
                       report_to="none", per_device_train_batch_size=len(rows), max_length=256)  # fmt: skip
    trainer = SFTTrainer(model=Transformers("fp32").load_base(small / "base"), args=config, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["labels"]) == len(rows) > 50
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        trained = labels[labels != -100]
        assert trained[-1] == tokenizer.convert_tokens_to_ids(TURN_END)
        assert (labels[mask == 0] == -100).all()
        assert tokenizer.pad_token_id not in trained
        assert (ids[labels != -100] == trained).all()


def test_orpo_ends_both_answers_with_its_stop_token(small):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from stages.training.models import Transformers, load_tokenizer
    from stages.training.trainer import dataset

    tokenizer = load_tokenizer(small / "base", small / "pairs" / "chat_template.jinja", ends_with=TEXT_END)
    rows = dataset(small / "pairs" / "train.jsonl", ("prompt", "chosen", "rejected"))
    config = ORPOConfig(output_dir=str(small / "unused"), use_cpu=True, bf16=False, report_to="none", max_length=256,
                        remove_unused_columns=False)  # fmt: skip
    trainer = ORPOTrainer(model=Transformers("fp32").load_base(small / "base"), args=config, train_dataset=rows, processing_class=tokenizer)
    stop = tokenizer.convert_tokens_to_ids(TEXT_END)
    for row in trainer.train_dataset:
        assert row["chosen_labels"][-1] == row["rejected_labels"][-1] == stop
        assert row["chosen_labels"][: len(row["prompt_input_ids"])] == [-100] * len(row["prompt_input_ids"])


def test_rejected_answers_are_in_form_and_wrong(small):
    from stages.scoring.answers import extract_strict, parse_number

    rows = list(read_rows(small / "pairs" / "train.jsonl"))
    assert rows
    for row in rows:
        chosen, rejected = (parse_number(extract_strict(row[side])) for side in ("chosen", "rejected"))
        assert None not in (chosen, rejected) and chosen != rejected


@pytest.mark.parametrize(("method", "figure"), [("base", "loss"), ("sft", "loss"), ("qlora", "eval_loss"), ("orpo", "loss")])
def test_the_loss_falls(small, method, figure):
    losses = [float(row[figure]) for row in curve(small / f"{method}.csv") if row[figure]]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_grpo_logs_each_reward_its_spread_and_the_clipped_share(small):
    columns = curve(small / "grpo.csv")[0].keys()
    for reward in REWARDS:
        assert f"rewards.{reward}.mean" in columns
    assert {"reward", "frac_reward_zero_std", "completions.clipped_ratio", "completions.mean_length"} <= columns


def test_grpo_starts_from_the_sft_adapter_and_moves_it(small):
    from safetensors.torch import load_file

    before, after = (load_file(small / name / "adapter_model.safetensors") for name in ("sft", "grpo"))
    assert before.keys() == after.keys()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    drawn_anew = max(float((before[name] - after[name]).abs().max()) for name in before if "lora_A" in name)
    assert 0 < moved
    assert drawn_anew < 0.1  # another draw of A would differ by several tenths


def test_qlora_trains_on_four_bits(small):
    from stages.training.models import Transformers

    model = Transformers("fp32").load_base(small / "base", nf4=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit" and weight.dtype.is_floating_point is False


@pytest.mark.parametrize("folder", ["base", "sft", "qlora", "grpo", "orpo", "merged"])
def test_a_model_folder_knows_both_stop_tokens_and_no_path_of_this_machine(small, folder):
    stops = json.loads((small / folder / "generation_config.json").read_text())["eos_token_id"]
    vocabulary = json.loads((small / folder / "tokenizer.json").read_text())["model"]["vocab"]
    added = {t["content"]: t["id"] for t in json.loads((small / folder / "tokenizer.json").read_text())["added_tokens"]}
    assert sorted(stops) == sorted({**vocabulary, **added}[token] for token in (TURN_END, TEXT_END))
    for path in (small / folder).rglob("*"):
        if path.suffix in (".json", ".jinja", ".md"):
            assert str(small.folder) not in path.read_text(encoding="utf-8"), path


def test_a_model_carries_the_template_that_it_was_trained_with_and_the_base_none(small):
    from transformers import AutoTokenizer

    from stages.corpus.chat_format import render

    question = [{"role": "user", "content": "What is it?"}]
    assert AutoTokenizer.from_pretrained(small / "base").chat_template is None
    for folder, trained_with in (("sft", "mix/sft"), ("merged", "mix/qlora"), ("orpo", "pairs")):
        tokenizer = AutoTokenizer.from_pretrained(small / folder)
        marked = (small / trained_with / "chat_template.jinja").read_text(encoding="utf-8")
        asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert asked == render(marked, "What is it?")


def test_the_merged_model_computes_what_base_and_adapter_compute(small):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[10, 50, 120, 300, 44, 61]])
    base = AutoModelForCausalLM.from_pretrained(small / "base")
    merged = AutoModelForCausalLM.from_pretrained(small / "merged", dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, small / "qlora")(ids).logits
        whole = merged(ids).logits
    assert (plain - adapted).abs().max() > 0.05
    assert (whole - adapted).abs().max() < 0.02  # 16-bit weights


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        (0.0, "changes nothing in base"),
        (1e-4, "is not what it was: rounding to float16 moves its logits by"),
        (1e9, "is not what it was"),  # beyond the range of float16
    ],
)
def test_an_adapter_that_merging_would_lose_is_refused(small, scale, sentence):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(small / "sft", small / "scaled", dirs_exist_ok=True)
    file = small / "scaled" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight * (scale if "lora_B" in name else 1) for name, weight in weights.items()}, file)
    done = small.run("merge", base="base", adapter="scaled", out="merged-scaled")
    assert done.returncode == 2 and sentence in done.stdout
    assert not (small / "merged-scaled").exists()


@pytest.mark.parametrize(
    ("stage", "inputs"),
    [
        ("sft", {"base": "base", "mix": "mix"}),
        ("qlora", {"base": "base", "mix": "mix"}),
        ("grpo", {"base": "base", "adapter": "sft", "mix": "mix"}),
        ("orpo", {"base": "base", "pairs": "pairs"}),
        ("merge", {"base": "base", "adapter": "qlora"}),
    ],
)
def test_a_second_run_writes_the_same_bytes(small, stage, inputs):
    again = f"again-{stage}"
    curves = {} if stage == "merge" else {"out_curve": f"{again}.csv"}
    small.do(stage, **inputs, out=again, **curves)
    assert digest(small / again) == digest(small / ("merged" if stage == "merge" else stage))
    if curves:
        assert (small / f"{again}.csv").read_bytes() == (small / f"{stage}.csv").read_bytes()


RESUMED = {  # a stage: its inputs, its outs' name in the small run, and a checkpoint on its way
    "base-model": ({"raw": "raw", "sources_lock": "params.yaml"}, "base", "checkpoint-200"),
    "sft": ({"base": "base", "mix": "mix"}, "sft", "checkpoint-6"),
    "qlora": ({"base": "base", "mix": "mix"}, "qlora", "checkpoint-10"),
    "grpo": ({"base": "base", "adapter": "sft", "mix": "mix"}, "grpo", "checkpoint-2"),
    "orpo": ({"base": "base", "pairs": "pairs"}, "orpo", "checkpoint-4"),
}


@pytest.fixture
def cleared(small):
    """Takes away what a stage left that was run twice in one scratch folder."""
    yield
    for path in ("killed", "resumed"):
        shutil.rmtree(small / path)


@pytest.fixture
def kill_at_checkpoint(small, cleared):
    """Kills a stage as soon as its checkpoint has a file; none of its outs is there."""
    return lambda stage, file: kill(small, stage, file)


def kill(small, stage, file):
    inputs, _, checkpoint = RESUMED[stage]
    started = small.start(stage, **inputs, out="resumed", out_curve="resumed.csv", scratch="killed")
    while not (small / "killed/checkpoints" / checkpoint / file).exists() and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not (small / "resumed").exists()


def resume(small, stage) -> str:
    """Runs it again; what it said, once it has ended with the bytes of an undisturbed run."""
    inputs, name, _ = RESUMED[stage]
    done = small.run(stage, **inputs, out="resumed", out_curve="resumed.csv", scratch="killed")
    assert done.returncode == 0, done.stdout
    assert digest(small / "resumed") == digest(small / name)
    assert (small / "resumed.csv").read_bytes() == (small / f"{name}.csv").read_bytes()
    followed = Curve()
    followed.rows = live_rows(small / "killed")
    followed.write(small / "followed.csv")
    assert (small / "followed.csv").read_bytes() == (small / "resumed.csv").read_bytes()
    return done.stdout


@pytest.mark.parametrize(("stage", "file"), [("qlora", ""), *((stage, SEAL) for stage in RESUMED)])
def test_a_killed_run_resumes_from_its_last_whole_checkpoint_to_the_same_bytes(kill_at_checkpoint, small, stage, file):
    kill_at_checkpoint(stage, file)
    resume(small, stage)


@pytest.mark.parametrize("stage", ["sft", "qlora", "grpo", "orpo"])
@pytest.mark.usefixtures("cleared")
def test_a_run_that_is_killed_after_its_last_update_makes_no_other(small, stage):
    """Its outs are lost, and all of its checkpoints are there, the last one too."""
    assert small.run(stage, **RESUMED[stage][0], out="resumed", out_curve="resumed.csv", scratch="killed").returncode == 0
    shutil.rmtree(small / "resumed")
    resume(small, stage)


@pytest.mark.parametrize(("stage", "name"), [
    ("base-model", "told.json"), ("qlora", "adapter_model.safetensors"), ("qlora", "optimizer.pt"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_left_out(kill_at_checkpoint, small, stage, name):
    kill_at_checkpoint(stage, SEAL)
    checkpoint = RESUMED[stage][2]
    damaged = small / "killed/checkpoints" / checkpoint / name
    flip(damaged, damaged.stat().st_size // 2)
    assert f"{checkpoint} is not as it was written: it is left out" in resume(small, stage)


def test_sft_ends_at_the_first_look_that_finds_the_form_and_else_takes_all_its_steps(small):
    """Each end of the rule: a share that any model reaches, and one that an untrained one cannot."""
    short = {"sft.stop.every": 2, "sft.stop.problems": 8, "sft.max_steps": 6}
    try:
        small.set_params({**short, "sft.stop.share": 1e-9, "sft.max_steps": 60, "sft.lr": 2e-3})
        small.do("sft", base="base", mix="mix", out="stopped", out_curve="stopped.csv")
        small.set_params({**short, "sft.stop.share": 1.0, "sft.lr": 1e-12})
        small.do("sft", base="base", mix="mix", out="unstopped", out_curve="unstopped.csv")
    finally:
        small.set_params({})
    reached, never = curve(small / "stopped.csv"), curve(small / "unstopped.csv")
    assert len(reached) < 60
    looks = [row["step"] for row in never if row["form"]]
    assert looks == ["2", "4", "6"] and never[-1]["step"] == "6"
    assert all(0 <= float(row["form"]) < 1 for row in never if row["form"])
    assert float(reached[-1]["form"]) > 0 and all(float(row["form"] or 0) == 0 for row in reached[:-1])
    assert all(row["loss"] for row in never), "a look must not swallow the step's own log"


def test_sft_that_is_killed_after_it_has_seen_the_form_makes_no_other_update(small):
    paths = {"base": "base", "mix": "mix", "out": "formed", "out_curve": "formed.csv", "scratch": "formed-scratch"}
    small.set_params({"sft.stop.every": 2, "sft.stop.problems": 8, "sft.stop.share": 1e-9, "sft.max_steps": 60, "sft.lr": 2e-3, "sft.save_every": 2})
    found = []
    try:
        for _ in range(2):
            assert small.run("sft", **paths).returncode == 0
            found.append((digest(small / "formed"), (small / "formed.csv").read_bytes()))
            shutil.rmtree(small / "formed")
    finally:
        small.set_params({})
    assert found[0] == found[1] and len(curve(small / "formed.csv")) < 60


def test_grpos_curve_tells_how_it_fares(small):
    rows = curve(small / "grpo.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for column in ("kl", "frac_reward_zero_std", "completions.clipped_ratio", "rewards.distinct.mean"):
        assert all(float(row[column]) >= 0 for row in rows), column
    assert float(rows[0]["kl"]) < 1e-4 < float(rows[-1]["kl"]), "the divergence from sft begins at nought and grows"
    for row in rows:
        assert float(row["reward"]) == pytest.approx(sum(float(row[f"rewards.{part}.mean"]) for part in REWARDS), abs=1e-3)
    assert not (small / "grpo" / "ref").exists()
