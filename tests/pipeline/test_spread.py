"""Two engines beside each other, on a CPU: the answers of one, and every death told and cleared up. GPUs of these names there are none."""

import time
from threading import Timer

import psutil
import pytest

from stages.corpus.chat_format import render
from stages.harness.jsonl import read_json, read_rows
from stages.inference.engine import Sampling
from stages.inference.spread import Spread
from stages.inference.transformers_engine import TransformersEngine

GPUS = ("-1", "-2")
PATHS = {"model": "merged", "mix": "mix"}
BATCH = 16
GREEDY, DRAWN = Sampling(max_new_tokens=48), Sampling(max_new_tokens=48, temperature=1.0, seed=3)
SOON = 10  # seconds


@pytest.fixture(scope="module")
def one(small):
    return TransformersEngine.from_folder(small / "merged", BATCH)


@pytest.fixture
def two(small):
    spread = Spread(TransformersEngine.from_folder, small / "merged", BATCH, gpus=GPUS)
    yield spread
    spread.close()


@pytest.fixture(scope="module")
def prompts(small, one):
    return [render(one.template, row["question"]) for row in read_rows(small / "mix/test.jsonl")]


def test_two_engines_answer_as_one(one, two, prompts):
    assert two.template == one.template
    for sampling in (GREEDY, DRAWN):
        for asked in (prompts, prompts[:1]):
            assert two.generate(asked, sampling) == one.generate(asked, sampling)
    pairs = [(prompt, " 5\n#### 5") for prompt in prompts[:5]]
    for asked in (pairs, pairs[:1], []):
        assert two.mean_log_probabilities(asked) == one.mean_log_probabilities(asked)


def test_one_that_is_killed_at_work_is_named_and_the_other_ends(two, prompts):
    processes = [engine.process for engine in two.engines]
    Timer(0.2, processes[1].kill).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the engine on GPU -2 was killed \(SIGKILL\) before it had answered$"):
        two.generate(prompts * 20, GREEDY)
    assert time.monotonic() - started < SOON and not any(process.is_alive() for process in processes)


def test_eval_writes_the_same_bytes_by_two_engines_and_its_record_says_so(small, monkeypatch):
    small.set_params({"eval.batch_size": BATCH, "eval.n_samples": 2})
    for name, gpus in (("one", ""), ("two", ",".join(GPUS))):
        monkeypatch.setitem(small.environment, "CUDA_VISIBLE_DEVICES", gpus)
        small.do("eval", **PATHS, out_metrics=f"{name}.json", out_predictions=f"{name}.jsonl")
    small.set_params({})
    for kind in ("json", "jsonl"):
        assert (small / f"two.{kind}").read_bytes() == (small / f"one.{kind}").read_bytes()
    assert read_json(small / f"scratch-{small.runs}/stage.json")["engines"] == 2


def test_a_stage_ends_with_an_engine_that_is_killed_and_leaves_no_process(small, monkeypatch):
    monkeypatch.setitem(small.environment, "CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    started = small.start("eval", **PATHS, out_metrics="killed.json", out_predictions="killed.jsonl")
    engines = []
    while len(engines) < len(GPUS):
        assert started.poll() is None, started.communicate()
        engines = [child for child in psutil.Process(started.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    engines[0].kill()
    output, _ = started.communicate(timeout=SOON)
    assert started.returncode == 1 and "the engine on GPU -1 was killed (SIGKILL)" in output.splitlines()[-1], output
    assert not psutil.wait_procs(children, timeout=SOON)[1] and not (small / "killed.json").exists()
