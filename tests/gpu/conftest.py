"""A small `scratch-gpu` on the GPU of this machine: 85 million weights, briefly trained, and runs of every method on it."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.harness.ranks import SHARDED
from stages.harness.run_stage import determinism
from stages.training.checkpoints import SEAL
from tests.imports import ROOT
from tests.pipeline.conftest import Workplace

UPDATES = 20
MADE_SMALL = {
    "preference_pairs.questions": 300,
    "sft.max_steps": UPDATES,
    "sft.log_every": 1,
    "sft.stop.share": None,
    "sft.save_every": 10,
    "qlora.max_steps": UPDATES,
    "qlora.log_every": 1,
    "qlora.eval_every": 10,
    "qlora.save_every": 10,
    "orpo.max_steps": UPDATES,
    "orpo.log_every": 1,
    "orpo.save_every": 10,
    "grpo.max_steps": 6,
    "grpo.save_every": 3,
}
INPUTS = {
    "sft": {"base": "base", "mix": "mix"},
    "qlora": {"base": "base", "mix": "mix"},
    "orpo": {"base": "base", "pairs": "pairs"},
    "grpo": {"base": "base", "adapter": "sft", "mix": "mix"},
}
AT_ONCE = 4  # runs that share the GPU


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    """Tests that start an engine themselves do so in the stages' environment; libraries read it as they are imported."""
    os.environ |= determinism(ROOT)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Workplace:
    """Everything up to sft and its merged model, by the stages themselves."""
    made = workplace(tmp_path_factory.mktemp("gpu"), {})
    made.do_all_up_to_sft()
    made.do("merge", base="base", adapter="sft", out="merged")
    return made


def workplace(folder: Path, changes: dict) -> Workplace:
    """Whose stages see one GPU, the first of this process's: they would spread a batch over several."""
    made = Workplace(folder, "scratch-gpu", {**MADE_SMALL, **changes})
    made.environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return made


def beside(place: Workplace, name: str, changes: dict) -> Workplace:
    """A workplace with parameters of its own that reads the inputs of `place`."""
    folder = place / f"runs/{name}"
    folder.mkdir(parents=True)
    return workplace(folder, changes)


def inputs(place: Workplace, method: str) -> dict[str, str]:
    return {name: str(place / path) for name, path in INPUTS[method].items()}


def killed_and_resumed(place: Workplace, method: str, checkpoint: int, name: str = "killed", changes: dict | None = None) -> Workplace:
    """A run of a method that was killed once a checkpoint was whole, and started again: its out and curve.csv are of both parts."""
    run = beside(place, f"{method}-{name}", changes or {})
    paths = {**inputs(place, method), "out": "out", "out_curve": "curve.csv"}
    started = run.start(method, scratch="killed", **paths)
    while not (run / f"killed/checkpoints/checkpoint-{checkpoint}/{SEAL}").is_file() and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not (run / "out").exists()
    done = run.run(method, scratch="killed", **paths)
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture(scope="session")
def train(place):
    """Trains a method under each of some changes of its section, side by side; returns the folders, which hold out and curve.csv."""

    def one(method: str, name: str, changes: dict) -> Path:
        run = beside(place, f"{method}-{name}", {f"{method}.{key}": value for key, value in changes.items()})
        run.do(method, **inputs(place, method), out="out", out_curve="curve.csv")
        return run.folder

    def all_of(method: str, runs: dict[str, dict]) -> list[Path]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            started = [pool.submit(one, method, name, changes) for name, changes in runs.items()]
            return [run.result() for run in started]

    return all_of


@pytest.fixture(scope="session")
def gpus() -> list[str]:
    """The numbers of two."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]


@pytest.fixture
def on_two(place, gpus):
    """Trains a method in two processes, side by side with other changes of its section; returns the folders."""

    def one(method: str, name: str, sharded: bool, changes: dict, base: str | None) -> Path:
        run = beside(place, f"{method}-on-two-{name}", {f"{method}.{key}": value for key, value in changes.items()})
        run.environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), SHARDED: str(sharded).lower()}
        run.do(method, processes=2, **inputs(place, method) | ({"base": base} if base else {}), out="out", out_curve="curve.csv")
        return run.folder

    def all_of(method: str, runs: dict[str, tuple[bool, dict]], base: str | None = None) -> list[Path]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            started = [pool.submit(one, method, name, *run, base) for name, run in runs.items()]
            return [run.result() for run in started]

    return all_of
