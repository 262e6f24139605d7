"""`mathmind chat` on a CUDA GPU: vLLM by itself, and transformers beside it, with a small merged model."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from stages.harness.jsonl import read_rows
from tests.imports import ROOT

pytestmark = pytest.mark.gpu
QUESTIONS = 20


@pytest.fixture(scope="module")
def chat(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "models/merged").mkdir(parents=True)
    (folder / "models/merged/sft").symlink_to(place / "merged")
    shutil.copy(place / "params.yaml", folder)
    asked = "\n".join([row["question"] for row in read_rows(place / "mix/test.jsonl")][:QUESTIONS])

    def run(*options: str) -> list[dict]:
        command = [sys.executable, "-m", "stages", "chat", "sft", "--json", *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, cwd=folder, env=environment, input=asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_vllm_answers_by_itself_and_says_what_transformers_says(chat):
    by_itself, named, theirs = chat(), chat("--engine", "vllm"), chat("--engine", "transformers")
    assert by_itself == named
    assert sum(a == b for a, b in zip(named, theirs, strict=True)) >= 0.9 * QUESTIONS  # 16 bits, whose last one kernels decide


def test_a_seed_draws_the_same_answers_again(chat):
    drawn = [chat("--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
