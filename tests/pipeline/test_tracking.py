"""Tracking with the real client: what a run leaves on the disk, what reaches a server on loopback, and what faults cost."""

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from stages.host.results import read_curve
from stages.host.run_files import COLUMNS
from stages.host.tracking import Followed, tracked
from stages.host.wandb_runs import run_id
from stages.host.wandb_sync import Synced, sync
from tests import wandb_server
from tests.imports import ROOT
from tests.pipeline.test_launcher import (
    FETCH,
    change,
    copy_of,
    dvc,
    environment,
    git,
    launch,
    mathmind,
    repository_with_a_base,
    scratch,
    small_disk_works,
)
from tests.wandb_files import recorded

pytestmark = pytest.mark.xdist_group("tracking")  # they share a base, made without and with tracking
RECORDS = ("results/timing/fetch.json", "results/timing/base-model.json")
DEAD = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": wandb_server.KEY}  # nobody listens on port 9


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """A repository with a small base, made without tracking."""
    return repository_with_a_base(tmp_path_factory.mktemp("untracked"), steps=40)


@pytest.fixture(scope="module")
def both(untracked, tmp_path_factory):
    """The same, in a path with spaces, made once more with a record for W&B and event files."""
    folder = copy_of(untracked, tmp_path_factory.mktemp("tracked") / "a path with spaces")
    track(folder, tensorboard=True)
    assert "didn't change, skipping" in dvc(folder, "repro").stdout
    git(folder, "rm", "-q", *RECORDS)  # or one that comes out as it was would look untouched
    git(folder, "commit", "-qm", "no records")
    done = dvc(folder, "repro", "--force", "base-model")
    assert done.returncode == 0 and warnings(done) == [] and trackers(folder) == [], done.stderr
    return folder


@pytest.fixture
def home(untracked, tmp_path):
    """A copy that a test may track as it likes; no test leaves a process behind."""
    folder = copy_of(untracked, tmp_path / "a path with spaces")
    yield folder
    wait_for(lambda: not trackers(folder))


@pytest.fixture
def server():
    with wandb_server.serving() as running:
        yield running


def trackers(folder):
    """What of tracking still runs there: a tracker, the client's service, its sync."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = " ".join(process.info["cmdline"] or ())
        if Path(process.info["cwd"] or "/").is_relative_to(folder) and ("stages.host.tracker" in line or "wandb" in line):
            found.append(line)
    return found


def track(folder, wandb="offline", tensorboard=False):
    change(folder, tracking__wandb=wandb, tracking__tensorboard=tensorboard)


def curve(folder):
    return [{name: pytest.approx(value) for name, value in row.items()} for row in read_curve(folder / "results/plots/base-model.csv")]


def warnings(done):
    return [line for line in done.stderr.splitlines() if "WARNING" in line]


def test_a_tracked_stage_gives_the_same_lock_and_touches_nothing_else(untracked, both):
    assert (both / "dvc.lock").read_bytes() == (untracked / "dvc.lock").read_bytes()
    touched = {line[3:] for line in git(both, "status", "--porcelain", "-uall").splitlines()}
    assert touched == {"params.yaml", *RECORDS}


def test_a_run_holds_its_config_every_row_and_its_timing_and_nothing_of_the_host(both):
    fetch, trained = recorded(both)
    assert [run.run.job_type for run in (fetch, trained)] == ["fetch", "base-model"]
    assert (trained.run.project, trained.run.run_group, trained.run.display_name) == ("mathmind", "master", "master/base-model")
    assert sorted(trained.run.tags) == ["embedded", "master"]
    assert trained.curve() == curve(both) and len(trained.curve()) == 2 and trained.exit_code == 0
    assert trained.config["base_model"]["steps"] == 40 and trained.config["seed"] == 0
    assert trained.config["image"]["role"] == "train" and trained.config["versions"]["trl"] == "1.13.0"
    sources = json.loads((both / "data/raw/sources.json").read_text())
    assert trained.config["data"]["test"]["files"] == fetch.config["data"]["test"]["files"] == sources["test"]["files"]
    record = json.loads((both / "results/timing/base-model.json").read_text())
    assert trained.summary["timing"] == record and trained.config["key"] == record["key"]
    for run in (fetch, trained):
        assert_nothing_of_the_host(next(run.folder.glob("*.wandb")).read_bytes().decode("latin-1"), both)


def test_event_files_hold_every_figure_and_tensorboard_reads_them(both):
    (events,) = (both / "results/tensorboard/master/base-model").iterdir()
    figures = {}
    for event in EventFileLoader(str(events)).Load():
        for value in event.summary.value:
            figures.setdefault(event.step, {})[value.tag] = value.tensor.float_val[0]
    assert [{"step": step, **found} for step, found in sorted(figures.items())] == curve(both)
    assert os.uname().nodename not in events.name


def assert_nothing_of_the_host(text, home):
    told = {"host": os.uname().nodename, "user": f'"{getpass.getuser()}"', "home": str(Path.home()), "folder": str(home), "python": sys.prefix}
    assert {what for what, found in told.items() if len(found) > 3 and found in text} == set()


def test_an_experiment_in_a_temporary_copy_is_recorded_in_the_repository_under_its_name(home):
    track(home)
    git(home, "commit", "-qam", "tracked")
    done = dvc(home, "exp", "run", "--temp", "-n", "more-chat", "-S", "fetch.sources.chat.rows=120", "fetch")
    assert done.returncode == 0, done.stderr
    (run,) = recorded(home)
    assert (run.run.display_name, run.run.run_group, sorted(run.run.tags)) == ("more-chat/fetch", "more-chat", ["embedded", "more-chat"])
    assert run.config["fetch"]["sources"]["chat"]["rows"] == 120


def test_what_was_recorded_is_sent_once_and_says_nothing_of_the_host(both, server):
    waiting = [run.folder.name for run in recorded(both)]
    empty = both / "wandb/offline-run-20260101_000000-gone"
    empty.mkdir()
    (empty / "run-gone.wandb").touch()
    planned = json.loads(mathmind(both, "sync", "--dry-run", "--json").stdout)
    assert planned == {"sent": [], "waiting": waiting, "running": [], "unreadable": [empty.name]} and server.seen == []
    for more, sentence in [
        (DEAD, "http://127.0.0.1:9 is out of reach"),
        ({**server.environment, "WANDB_API_KEY": "b" * 40}, "2 of 2 runs are not sent: the server refuses the key"),
        ({"WANDB_BASE_URL": server.address, "HOME": str(both)}, "there is no key"),
    ]:
        done = mathmind(both, "sync", **more)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert server.runs == {}

    done = mathmind(both, "sync", "--json", **server.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {**planned, "sent": waiting, "waiting": []}
    run = next(run for run in server.runs.values() if run.about["jobType"] == "base-model")
    assert [{"step": row["_step"], **{name: value for name, value in row.items() if name[0] != "_"}} for row in run.history] == curve(both)
    assert run.config["base_model"]["steps"] == 40 and run.summary["timing"]["stage"] == "base-model" and run.exit_code == 0
    assert_nothing_of_the_host(server.sent, both)
    asked = len(server.seen)
    assert json.loads(mathmind(both, "sync", "--json", **server.environment).stdout)["sent"] == []
    assert len(server.seen) == asked


def test_a_killed_run_and_the_one_that_goes_on_are_one_run(home):
    track(home)
    change(home, fetch__sources__pretraining__rows=20000)
    started = subprocess.Popen(FETCH, cwd=home, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: list((home / "wandb").glob("offline-run-*")))
    started.kill()
    started.wait()
    wait_for(lambda: not trackers(home))
    assert launch(home).returncode == 0
    killed, whole = recorded(home)
    assert (killed.run.run_id, killed.exit_code) == (whole.run.run_id, 137) and whole.exit_code == 0


def test_a_stage_that_fails_is_a_run_that_failed_and_its_own_words_are_all_that_is_said(home):
    track(home)
    change(home, fetch__sources__test__rows=10**7)
    done = launch(home)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "ask for fewer" in done.stderr
    (run,) = recorded(home)
    assert run.exit_code == 2


def wait_for(what, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (DEAD, "http://127.0.0.1:9 is out of reach"),
        ({"WANDB_API_KEY": "b" * 40}, "the server refuses the key"),
        ({"WANDB_API_KEY": "", "HOME": "/nowhere"}, "there is no key"),
    ],
    ids=["a server that is gone", "a key that is refused", "no key"],
)
def test_what_cannot_be_sent_costs_a_line_and_is_kept(home, server, more, sentence):
    track(home, "online")
    outs = outs_of(home)
    started = time.monotonic()
    done = launch(home, **{**server.environment, **more})
    assert time.monotonic() - started < 20
    assert done.returncode == 0 and outs_of(home) == outs and scratch(home) == []
    (line,) = done.stderr.splitlines()
    assert line == f"docker/run: WARNING: fetch: not sent: {line.partition('not sent: ')[2]}" and sentence in line and "mathmind sync" in line
    assert len(json.loads(mathmind(home, "sync", "--dry-run", "--json").stdout)["waiting"]) == 1


def outs_of(home):
    """What a stage's outs hold."""
    return {path.name: path.read_bytes() for path in (home / "data/raw").rglob("*") if path.is_file()}


def test_a_server_that_does_not_answer_is_not_waited_for(home, server):
    server.stall = 120
    track(home, "online")
    started = time.monotonic()
    done = launch(home, **server.environment, WANDB_X_GRAPHQL_TIMEOUT_SECONDS="1")
    assert done.returncode == 0 and time.monotonic() - started < 20
    assert len(warnings(done)) == 1 and "not sent" in done.stderr


def test_a_signal_while_the_rest_is_sent_ends_the_sending_and_not_the_stage(home, server):
    server.stall = 120
    track(home, "online")
    record = home / "results/timing/fetch.json"
    record.unlink()
    started = subprocess.Popen(FETCH, cwd=home, env=environment(**server.environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: record.is_file() and not scratch(home))
    time.sleep(0.5)  # the launcher has but to say how it ended
    started.send_signal(signal.SIGTERM)
    output, errors = started.communicate(timeout=5)
    assert started.returncode == 0 and output.startswith("fetch: wrote data/raw") and len(errors.splitlines()) == 1, errors


@pytest.mark.skipif(not small_disk_works(), reason="no file system can be mounted here")
@pytest.mark.parametrize(("place", "options"), [("wandb", "size=4k"), ("wandb", "ro"), ("results/tensorboard", "size=4k")])
def test_a_disk_that_takes_no_record_costs_a_line(home, place, options):
    track(home, "offline" if place == "wandb" else "disabled", tensorboard=place != "wandb")
    (home / place).mkdir()
    fill = f"head -c 9999 /dev/zero > '{place}/filler' 2>/dev/null;" if options != "ro" else ""
    command = f"mount -t tmpfs -o {options} none '{home / place}' && {{ {fill} {' '.join(FETCH)}; }}"
    done = launch(home, ["unshare", "-rm", "bash", "-c", command])
    assert done.returncode == 0 and done.stdout.startswith("fetch: wrote data/raw"), done.stderr
    assert len(warnings(done)) == 1 and "not tracked" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_killed_tracker_costs_a_line(home):
    track(home)
    change(home, fetch__sources__pretraining__rows=20000)
    started = subprocess.Popen(FETCH, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (tracker,) = wait_for(lambda: [child for child in psutil.Process(started.pid).children() if "stages.host.tracker" in child.cmdline()])
    tracker.kill()
    output, errors = started.communicate()
    assert started.returncode == 0 and "fetch: wrote data/raw" in output
    assert errors.splitlines() == [
        "docker/run: WARNING: tracking ended with -9 before it had finished: what it had recorded lies in wandb/"
    ]


WRITES_ROWS = """
import json, sys, time
first, last, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with open(path, "a", buffering=1) as file:
    for step in range(first, last + 1):
        print(json.dumps({"step": step, "loss": 1 / step, "rewards.exact.mean": step}), file=file)
        time.sleep(0.05)
"""


def a_run(folder, **about):
    """A run in a folder of its own, whose stage is a process of ours that writes rows as one would."""
    (folder / "scratch/checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "results/timing").mkdir(parents=True, exist_ok=True)
    (folder / "results/timing/grpo.json").write_text('{"seconds": 1.5}')
    shutil.copytree(ROOT / "docker", folder / "docker", dirs_exist_ok=True)
    given = {"outs": ("results/plots/grpo.csv",), "wandb": "online", "tensorboard": True, **about}
    return Followed(stage="grpo", key="k" * 16, experiment="night", project="mathmind", tree=str(folder), home=str(folder),
                    scratch=str(folder / "scratch"), profile="embedded", role="train", image="cpu", params={"grpo": {"lr": 0.1}}, **given)  # fmt: skip


def writes_rows(folder, first, last):
    return subprocess.Popen([sys.executable, "-c", WRITES_ROWS, str(first), str(last), str(folder / "scratch/checkpoints/curve.jsonl")])


def test_rows_that_a_stage_writes_reach_the_server_while_it_runs_and_once_where_it_is_resumed(tmp_path, server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    run = a_run(tmp_path)

    def steps():
        return [row["_step"] for row in server.runs[run_id(run)].history] if run_id(run) in server.runs else []

    with tracked(run):  # killed: no word of how it ended
        with writes_rows(tmp_path, 1, 15):
            pass
        wait_for(lambda: len(steps()) >= 10)
    assert steps() == list(range(1, 15))  # the newest may have been half of a row
    with tracked(run) as tracker:
        with writes_rows(tmp_path, 11, 20):  # from its last checkpoint
            pass
        rows = ["step,loss,rewards.exact.mean", *(f"{step},{1 / step:.6g},{step}" for step in range(1, 21))]
        (tmp_path / "results/plots").mkdir()
        (tmp_path / "results/plots/grpo.csv").write_text("\n".join(rows) + "\n")
        tracker.status = 0
    assert steps() == list(range(1, 21))
    sent = server.runs[run_id(run)]
    assert [row["rewards.exact.mean"] for row in sent.history] == list(range(1, 21)) and sent.exit_code == 0
    assert trackers(tmp_path) == []
    assert sync(tmp_path, dry_run=True) == Synced(sent=[], waiting=[], running=[], unreadable=[])


def test_completions_come_as_a_table_with_questions_and_gold_answers_and_scores_as_the_summary(tmp_path, server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    run = a_run(tmp_path, outs=("results/metrics/grpo.json", "results/predictions/grpo.jsonl"), tensorboard=False)
    for folder in ("results/metrics", "results/predictions", "data/mix"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "results/metrics/grpo.json").write_text('{"scores": {"pass_at_1": 0.5}}')
    answers = [("<SOLUTION>2</SOLUTION>", "2", True), ("no idea", None, False)]
    (tmp_path / "results/predictions/grpo.jsonl").write_text("".join(
        json.dumps({"id": f"t{n}", "prompt": "own", "completion": text, "answer": answer, "correct": correct}) + "\n"
        for n, (text, answer, correct) in enumerate(answers)
    ))  # fmt: skip
    (tmp_path / "data/mix/test.jsonl").write_text("".join(json.dumps({"id": f"t{n}", "question": f"q{n}", "answer": "#### 2"}) + "\n" for n in range(2)))
    with tracked(run) as tracker:
        tracker.status = 0
    sent = server.runs[run_id(run)]
    assert sent.summary["scores"] == {"pass_at_1": 0.5} and sent.summary["timing"] == {"seconds": 1.5}
    assert sent.table("completions") == {"columns": list(COLUMNS), "data": [
        ["t0", "own", "q0", "<SOLUTION>2</SOLUTION>", "#### 2", "2", True], ["t1", "own", "q1", "no idea", "#### 2", None, False],
    ]}  # fmt: skip
