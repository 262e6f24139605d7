"""Tracking as far as no client is needed: what is read of a running stage, how runs are named, what a failed sync says."""

import json
import re

import pytest

from stages.harness.errors import InputError
from stages.harness.params import section
from stages.host.run_files import SAMPLE, live_rows, sample
from stages.host.tracker import attempt
from stages.host.tracking import Followed, Tracking, as_folder, experiment, read_followed
from stages.host.wandb_runs import run_id
from stages.host.wandb_sync import reason
from stages.training.curves import Curve
from tests.imports import ROOT


def test_a_running_stages_rows_are_read_as_it_logs_them_named_as_in_its_curve(tmp_path):
    assert live_rows(tmp_path) == {}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/curve.jsonl").write_text('{"step": 9, "loss": 9.0}\n')  # of a run that was killed
    curve = Curve(tmp_path / "checkpoints/curve.jsonl")
    assert live_rows(tmp_path) == {}
    curve.add_log(1, {"loss": 0.5, "learning_rate": 0.1, "epoch": 0.1, "rewards/exact/mean": 2.0})
    curve.add_log(1, {"eval_loss": 0.7, "eval_runtime": 3.0})
    with curve.live.open("a") as file:
        file.write('{"step": 2, "lo')  # just being written
    assert live_rows(tmp_path) == curve.rows == {1: {"loss": 0.5, "lr": 0.1, "rewards.exact.mean": 2.0, "eval_loss": 0.7}}


def test_a_table_samples_predictions_evenly_with_their_questions(tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"id": str(n), "question": f"q{n}", "answer": f"#### {n}"}) + "\n" for n in range(1319)))
    rows = [{"id": str(n), "prompt": "own", "completion": f"c{n}", "answer": str(n), "correct": True} for n in range(1319)]
    table = sample(rows, test)
    assert SAMPLE * 0.9 < len(table) <= SAMPLE
    assert table[1] == ["14", "own", "q14", "c14", "#### 14", "14", True]
    assert sample(rows[:3], tmp_path / "absent")[2] == ["2", "own", None, "c2", None, "2", True]


RUN = Followed(stage="eval@base", key="k", experiment="a", wandb="offline", project="p", tensorboard=False, tree="", home="",
               scratch="", outs=("o",), role="train", image="cpu", profile="embedded", params={})  # fmt: skip


def test_a_run_is_the_same_by_what_it_is_made_of_and_who_asked_for_it():
    other = [Followed(**{**vars(RUN), name: "b"}) for name in ("stage", "key", "experiment")]
    assert len({run_id(RUN), *map(run_id, other)}) == 4
    assert run_id(RUN) == run_id(Followed(**{**vars(RUN), "tree": "elsewhere", "wandb": "online"}))


def test_an_experiment_is_named_by_dvc_else_by_its_branch(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_EXP_NAME", "calmy-joey")
    assert experiment(ROOT) == "calmy-joey"
    monkeypatch.delenv("DVC_EXP_NAME")
    assert experiment(ROOT)
    assert experiment(tmp_path) == "unnamed"


@pytest.mark.parametrize(("name", "folder"), [("a/b", "a-b"), ("../..", "unnamed"), ("eval@base", "eval@base"), ("", "unnamed")])
def test_a_name_is_one_folders(name, folder):
    assert as_folder(name) == folder


@pytest.mark.parametrize(
    ("tracking", "sentence"),
    [
        ({"wandb": "onlin", "project": "p", "tensorboard": False}, "tracking.wandb is 'onlin'"),
        ({"wandb": "offline", "project": "p", "tensorboard": "yes"}, "tracking.tensorboard is 'yes'"),
        ({"wandb": "offline", "project": "p"}, "parameter tracking.tensorboard is missing"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, tracking, sentence):
    with pytest.raises(InputError, match=sentence):
        section(tmp_path / "params.yaml", {"tracking": tracking}, "tracking", Tracking)


def test_what_goes_wrong_is_a_sentence_with_what_to_do():
    def fail(error):
        raise error

    troubles: list[str] = []
    for error in (ModuleNotFoundError(name="wandb"), OSError(28, "No space left on device"), ValueError("odd\nmore"), KeyError()):
        assert attempt(troubles, lambda: fail(error)) is None
    assert troubles == [
        "not tracked: wandb is not installed: run `make .venv`",
        "not tracked: No space left on device in wandb/ or results/tensorboard/",
        "not tracked: ValueError: odd",
        "not tracked: KeyError: no more is known",
    ]


def test_the_tracker_is_started_by_docker_run_alone():
    with pytest.raises(InputError, match="docker/run"):
        read_followed("")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("wandb: Loaded credentials for http://h:9 from X.\nwandb: ERROR x: giving up after 2 attempt(s)", "http://h:9 is out of reach"),
        ("wandb: ERROR returned error 401: {}", "refuses the key"),
        ("Error: No API key configured. Use `wandb login` to log in.", "there is no key"),
        ("wandb: ERROR WANDB_API_KEY invalid: API key must have 40+ characters, has 3.", "40\\+ characters, has 3"),
        ("", "said nothing"),
    ],
)
def test_a_failed_sync_says_why_and_what_to_do(said, sentence):
    assert re.search(sentence, reason(said))
