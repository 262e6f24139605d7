"""A whole small comparison, made once a session by the real stages: minutes of the graph in half a minute."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.harness.run_stage import determinism
from tests.imports import ROOT

CHANGES = {
    "fetch.sources.pretraining.rows": 3000,
    "fetch.sources.reasoning.rows": 300,
    "fetch.sources.chat.rows": 100,
    "fetch.sources.rl.rows": 60,
    "fetch.sources.validation.rows": 20,
    "fetch.sources.test.rows": 100,
    "fetch.documents": {"worked": 0.6, "tagged": 0.2, "boxed": 0.1, "arithmetic": 0.0, "terse_chat": 0.05, "chat": 0.05},
    "fetch.careless": 0.0,  # two habits at odds leave the model torn, and rounding decides what it says
    "base_model.architecture.hidden": 64,
    "base_model.architecture.ffn": 256,
    "base_model.architecture.layers": 2,
    "base_model.steps": 400,
    "base_model.lr": 0.003,
    "base_model.save_every": 100,
    "prepare_mix.sft_rows": 100,
    "prepare_mix.grpo_reasoning_rows": 20,
    "preference_pairs.questions": 60,
    "sft.max_steps": 12,
    "sft.lr": 0.002,
    "sft.stop.share": None,
    "sft.save_every": 6,
    "qlora.max_steps": 20,
    "qlora.eval_every": 5,
    "qlora.save_every": 5,
    "qlora.log_every": 5,
    "grpo.max_steps": 4,
    "grpo.per_device_batch": 8,
    "grpo.prompts_per_step": 2,
    "grpo.save_every": 2,
    "grpo.max_completion": 40,
    "orpo.max_steps": 8,
    "orpo.save_every": 4,
    "orpo.log_every": 1,
    "sft.log_every": 1,
}
SMALL_GRAPH = {
    **CHANGES,
    "eval_gguf.problems": 20,
    "eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None},  # of so few problems it says nothing
}


def assert_one_sentence(done: subprocess.CompletedProcess, sentence: str) -> None:
    """A stage that refused its input, in words of ours."""
    assert done.returncode == 2, done.stdout
    assert sentence in done.stdout and "Traceback" not in done.stdout


def flip(path: Path, offset: int) -> None:
    """One bit of a file, which DVC may hold read-only."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def set_dotted(values, dotted, value):
    *path, last = dotted.split(".")
    for name in path:
        values = values[name]
    values[last] = value


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where tests run side by side, those stay together that share what takes long to make.

    That is a file's tests of the small comparison, and all tests of the small graph.
    """
    for item in items:
        if "rebuilt" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("the small graph"))
        elif "small" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


class Workplace:
    """A folder with params.yaml in which stages run as the launcher runs them."""

    def __init__(self, folder: Path, profile: str = "embedded", made_small: Mapping[str, Any] = CHANGES) -> None:
        self.folder, self.profile, self.made_small = folder, profile, made_small
        self.runs = 0
        self.environment = {
            "PATH": os.environ["PATH"],
            **determinism(ROOT),
            **({"TORCHDYNAMO_DISABLE": "1"} if profile == "embedded" else {}),  # where no GPU is asked for, as the launcher has it
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self.set_params({})

    def set_params(self, changes) -> None:
        values = YAML(typ="safe").load((ROOT / "params" / f"{self.profile}.yaml").read_text(encoding="utf-8"))
        for dotted, value in {**self.made_small, **changes}.items():
            set_dotted(values, dotted, value)
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(values, file)

    def start(self, stage: str, *, scratch: str = "scratch", processes: int = 1, **paths: str) -> subprocess.Popen:
        several = ["stages.harness.run_ranks", "--processes", str(processes)]
        command = [sys.executable, "-m", *(several if processes > 1 else ["stages.harness.run_stage"]), stage]
        command += ["--scratch", scratch, "--local-files", "local"]
        for name, path in paths.items():
            command += [f"--{name.replace('_', '-')}", path]
        (self.folder / scratch / "checkpoints").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, stage: str, *, processes: int = 1, **paths: str) -> subprocess.CompletedProcess:
        started = self.start(stage, processes=processes, **paths)
        output, _ = started.communicate()
        return subprocess.CompletedProcess(started.args, started.returncode, output)

    def do(self, stage: str, *, processes: int = 1, **paths: str) -> None:
        """Runs a stage from nothing; asserts that it ends well."""
        self.runs += 1
        done = self.run(stage, scratch=f"scratch-{self.runs}", processes=processes, **paths)
        assert done.returncode == 0, done.stdout

    def do_all_up_to_sft(self) -> None:
        """Sources, base, training sets, pairs and sft, each by its stage from nothing."""
        self.do("fetch", sources_lock="params.yaml", out="raw")
        self.do("base-model", raw="raw", sources_lock="params.yaml", out="base", out_curve="base.csv")
        self.do("prepare-mix", raw="raw", tokenizer="base", out="mix")
        (self / "teacher").mkdir()
        self.do("preference-pairs", raw="raw", base="base", mix="mix", teacher="teacher", out="pairs")
        self.do("sft", base="base", mix="mix", out="sft", out_curve="sft.csv")

    def __truediv__(self, path: str) -> Path:
        return self.folder / path


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Workplace:
    """Everything up to the adapters, each made by its real stage at a small size."""
    place = Workplace(tmp_path_factory.mktemp("small"))
    place.do_all_up_to_sft()
    place.do("qlora", base="base", mix="mix", out="qlora", out_curve="qlora.csv")
    place.do("grpo", base="base", adapter="sft", mix="mix", out="grpo", out_curve="grpo.csv")
    place.do("orpo", base="base", pairs="pairs", out="orpo", out_curve="orpo.csv")
    place.do("merge", base="base", adapter="qlora", out="merged")
    return place


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory) -> Path:
    """A repository on its branch main in which the whole graph, made small, was rebuilt as docs/experiments.md says, and committed."""
    from stages.host.plots_page import write_plots_page
    from tests.pipeline.reader import walk
    from tests.pipeline.test_launcher import change, copy_of_the_tree, git

    folder = tmp_path_factory.mktemp("rebuilt") / "mathmind"
    copy_of_the_tree(folder)
    for command in (["branch", "-M", "main"], ["config", "user.name", "test"], ["config", "user.email", "test@example.org"]):
        git(folder, *command)
    change(folder, **SMALL_GRAPH)
    walk(folder, "docs/experiments.md", "Rebuild")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a small graph")
    write_plots_page(folder)
    return folder


@pytest.fixture
def place(rebuilt, tmp_path) -> Iterator[Path]:
    """A copy of it that has DVC's cache in common with the others: what one has run, another need not run again."""
    from tests.pipeline.test_launcher import end_queue_workers

    folder = tmp_path / "mathmind"
    shutil.copytree(rebuilt, folder, symlinks=True, ignore=lambda path, _: ["cache"] if Path(path).name == ".dvc" else [])
    (folder / ".dvc/config.local").write_text(f"[cache]\n    dir = {rebuilt / '.dvc/cache'}\n", encoding="utf-8")
    yield folder
    end_queue_workers(folder)
