"""grpo on two CUDA GPUs: an engine beside each of two trainers, or one apart from one trainer.

    python -m pytest -m gpu tests/gpu/test_parallel_grpo.py
"""

import signal

import psutil
import pytest

from stages.harness.jsonl import read_json, read_rows
from stages.training.checkpoints import SEAL
from tests.gpu.conftest import beside, inputs
from tests.gpu.test_training import PACKED, adapter, column
from tests.pipeline.conftest import Workplace
from tests.pipeline.test_parallel import ENDS_WITHIN, ranks_of, wait_for

pytestmark = pytest.mark.gpu
WAYS = {"one": (1, 0), "two": (2, 0), "apart": (1, 1)}  # processes that train, GPUs that engines have alone
UNMERGED = {"engine": "vllm", "merged": False, "kv_cache_gib": 2.0, "cuda_graphs": False, "importance_correction": True, "importance_cap": 3.0}
PATHS = {"out": "out", "out_curve": "curve.csv"}


def workplace(place: Workplace, gpus: list[str], way: str, name: str, changes: dict) -> Workplace:
    """Whose stages see the GPUs of a way."""
    run = beside(place, f"grpo-{way}-{name}", {f"grpo.{key}": value for key, value in {"log_every": 1, **changes}.items()})
    processes, apart = WAYS[way]
    run.environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: processes + apart]), "MATHMIND_ROLLOUT_GPUS": str(apart)}
    return run


@pytest.fixture(scope="module")
def trained(place, gpus):
    """Trains in one of the WAYS; returns the folder, which holds out and curve.csv. What has run before is not run again."""
    made = {}

    def train(way: str, name: str = "merged", **changes):
        if (way, name) not in made:
            run = workplace(place, gpus, way, name, changes)
            run.do("grpo", processes=WAYS[way][0], **inputs(place, "grpo"), **PATHS)
            record = read_json(run / "scratch-1/stage.json")
            print(way, name, {key: record.get(key) for key in ("processes", "rollout_gpus", "update_seconds", "peak_gpu_memory_mib", "seconds")})
            made[way, name] = run.folder
        return made[way, name]

    return train


@pytest.mark.parametrize("way", ["two", "apart"])
def test_a_second_run_gives_the_same_bytes(trained, way):
    first, again = trained(way), trained(way, "again")
    assert adapter(first) == adapter(again)
    assert (first / "curve.csv").read_bytes() == (again / "curve.csv").read_bytes()


@pytest.mark.parametrize("way", ["two", "apart"])
def test_the_first_update_is_that_of_one_gpu_but_for_what_rounding_drew(trained, way):
    """On the same prompts, each with its own seed; an engine with other numbers of them rounds otherwise, and a token now and then is another."""
    one, other = trained("one"), trained(way)
    for figure, apart in (("completions.mean_length", 0.1), ("entropy", 0.1), ("rewards.match_format_approximately.mean", 0.5)):
        print(way, figure, column(one, figure)[0], column(other, figure)[0])
        assert column(other, figure)[0] == pytest.approx(column(one, figure)[0], rel=apart, abs=apart), figure


@pytest.mark.parametrize("way", ["two", "apart"])
@pytest.mark.parametrize(("name", "changes"), [
    ("packed", {"packed": PACKED}), ("unmerged", {"rollouts": UNMERGED}), ("nf4", {"nf4": True, "rollouts": UNMERGED}),
    ("kl", {"beta": 0.01, "packed": PACKED}),
])  # fmt: skip
def test_it_trains_in_every_way_of_holding_base_and_engine(trained, way, name, changes):
    """The stage itself fails where the frozen base is another after training."""
    folder = trained(way, name, **changes)
    norms = column(folder, "grad_norm")
    assert len(norms) == 6 and all(0 < norm < 100 for norm in norms)
    assert max(column(folder, "frac_reward_zero_std")) < 1


def test_what_is_drawn_follows_from_places_and_not_from_how_many_are_asked_at_once(place):
    """On one GPU: all prompts at once, and each half as an engine of two would be asked."""
    from stages.inference.vllm_engine import set_up_vllm
    from stages.training.models import load_tokenizer
    from stages.training.rollouts import Rollouts, VllmRollouts, adapter_folder, write_adapter

    set_up_vllm()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    scratch = place / "drawn"
    scratch.mkdir()
    write_adapter(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "sft"), adapter_folder(scratch))
    tokenizer = load_tokenizer(place / "base", place / "mix/grpo/chat_template.jinja", ends_with="<|im_end|>")
    rows = [row["prompt"] for row in read_rows(place / "mix/grpo/train.jsonl")][:8]
    prompts = [ids for row in rows for ids in 4 * [tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True)["input_ids"]]]
    engine = VllmRollouts(Rollouts(**UNMERGED), place / "base", precision="bf16", rank=16, max_length=512, requests=32, raw=True,
                          folder=adapter_folder(scratch))  # fmt: skip

    def drawn(first: int, last: int) -> list[list[int]]:
        sampling = {"max_tokens": 100, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return engine.generate(prompts[first:last], None, step=0, first=first, seed=0, stop=tokenizer.eos_token_id, **sampling)[0]

    whole, halves = drawn(0, 32), drawn(0, 16) + drawn(16, 32)
    engine.close()
    same = sum(ours == theirs for ours, theirs in zip(whole, halves, strict=True))
    print("the same completions, of 32:", same)
    assert same >= 28 and len({tuple(ids) for ids in whole}) > 8


@pytest.mark.parametrize(("way", "sentence"), [
    ("two", "grpo: process 1 was killed (SIGKILL): the others ended with it"),
    ("apart", "was killed (SIGKILL) before it had answered"),
])  # fmt: skip
def test_it_ends_with_a_trainer_or_an_engine_that_is_killed_and_goes_on_to_the_same_bytes(trained, place, gpus, way, sentence):
    undisturbed = trained(way)
    run = workplace(place, gpus, way, "killed", {})
    asked = {**inputs(place, "grpo"), **PATHS, "processes": WAYS[way][0], "scratch": "killed"}
    started = run.start("grpo", **asked)
    wait_for(run / f"killed/checkpoints/checkpoint-3/{SEAL}", started)
    children = psutil.Process(started.pid).children(recursive=True)
    victim = ranks_of(started)[1] if way == "two" else next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
    victim.send_signal(signal.SIGKILL)
    output, _ = started.communicate(timeout=ENDS_WITHIN)
    assert started.returncode in (1, 128 + signal.SIGKILL) and sentence in output, output
    assert not psutil.wait_procs(children, timeout=5)[1] and not (run / "out").exists()
    done = run.run("grpo", **asked)
    assert done.returncode == 0, done.stdout
    assert adapter(run.folder) == adapter(undisturbed)
    assert (run / "curve.csv").read_bytes() == (undisturbed / "curve.csv").read_bytes()
