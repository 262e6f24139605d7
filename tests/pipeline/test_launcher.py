"""docker/run with its native engine, in a clone: whole outs or none, records apart, and every fault in one sentence."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from stages.harness.run_stage import determinism
from stages.host.graph import lock_keys
from tests.imports import ROOT
from tests.pipeline.conftest import set_dotted

FETCH = ["docker/run", "export", "fetch", "--sources-lock", "params/sources.lock.yaml", "--out", "data/raw"]


def files_of_the_tree():
    """What a commit of the working tree would hold."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_of_the_tree(folder):
    """The working tree in a folder, as a git and DVC repository, in which dvc can run."""
    for path in files_of_the_tree():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a clone"]):
        git(folder, *command)


@pytest.fixture
def clone(tmp_path):
    """A copy of the tree whose path has spaces."""
    folder = tmp_path / "a path with spaces"
    copy_of_the_tree(folder)
    yield folder
    end_queue_workers(folder)


def end_queue_workers(folder):
    """A DVC queue's workers end of themselves when nothing is queued, except now and then one that does not."""
    workers = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if "queue-worker" in (process.info["cmdline"] or ()) and Path(process.info["cwd"] or "/").is_relative_to(folder):
            process.kill()
            workers.append(process)
    psutil.wait_procs(workers, timeout=10)


def environment(**more):
    """The caller's environment as after `. .venv/bin/activate`: DVC's queue workers look for `dvc` on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MATHMIND_"))}
    return {**kept, "PATH": path, "MATHMIND_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1", **more}


def change(folder, **changes):
    path = folder / "params.yaml"
    values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        set_dotted(values, dotted.replace("__", "."), value)
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


def only(folder, *stages):
    """Takes all other stages out of the graph, and the lock with them."""
    graph = YAML(typ="safe").load((folder / "dvc.yaml").read_text(encoding="utf-8"))
    with (folder / "dvc.yaml").open("w", encoding="utf-8") as file:
        YAML().dump({"stages": {name: graph["stages"][name] for name in stages}}, file)
    (folder / "dvc.lock").unlink()


def misbehave(folder: Path, lines: str) -> None:
    """Puts lines of Python at the start of the clone's fetch: code is mounted, so the container runs them."""
    path = folder / "stages/fetch.py"
    text = path.read_text(encoding="utf-8")
    found = re.search(r'^def run\(.*?\) -> None:\n    """.*?"""\n', text, re.MULTILINE | re.DOTALL)
    indented = "".join(f"    {line}\n" for line in lines.splitlines())
    path.write_text(text[: found.end()] + indented + text[found.end() :], encoding="utf-8")


def launch(folder, command=FETCH, **more):
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True)


def mathmind(folder, *arguments, **more):
    return launch(folder, [sys.executable, "-B", "-m", "stages", *arguments], **more)


def dvc(folder, *arguments, **more):
    """Runs dvc to its end. What it says goes through files: a pipe would be held open by the workers that a queue starts."""
    command = [sys.executable, "-m", "dvc", *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, cwd=folder, env=environment(**more), stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, output.read(), errors.read())


def repository_with_a_base(folder, steps):
    """A repository in which fetch and a base-model of so few steps have run and are committed."""
    copy_of_the_tree(folder)
    only(folder, "fetch", "base-model")
    change(folder, fetch__sources__pretraining__rows=500, base_model__steps=steps, base_model__architecture__layers=1)
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stderr
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a base")
    return folder


def copy_of(repository, folder):
    """A copy of it, cache and outs too, that a test may damage."""
    subprocess.run(["cp", "-a", str(repository), str(folder)], check=True)
    return folder


def scratch(folder):
    """What is left below the scratch folder, locks apart."""
    found = (folder / ".dvc/tmp/mathmind").rglob("*")
    return [path for path in found if path.is_file() and path.suffix != ".lock"]


def test_a_stage_writes_its_outs_a_record_and_nothing_else(clone):
    done = launch(clone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fetch: wrote data/raw in ")
    assert (clone / "data/raw/sources.json").is_file()
    assert scratch(clone) == []
    status = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=clone, capture_output=True, text=True).stdout
    touched = {line.split()[-1] for line in status.splitlines()}
    assert all(path.startswith(("data/raw/", "results/timing/fetch.json")) for path in touched), touched


def test_the_record_says_what_ran_where_and_names_no_host(clone):
    launch(clone)
    record = json.loads((clone / "results/timing/fetch.json").read_text())
    assert record["stage"] == "fetch" and record["engine"] == "native" and record["image"] == "cpu"
    assert record["seconds"] > 0 and record["peak_memory_mib"] > 5 and record["pinned"] is True
    assert record["machine"]["cpu"] and os.uname().nodename not in json.dumps(record)


def test_the_callers_environment_shapes_no_bits_unless_run_unpinned_lets_it_and_the_record_says_so(clone):
    record = clone / "results/timing/fetch.json"
    assert launch(clone, OMP_NUM_THREADS="1").returncode == 0
    assert json.loads(record.read_text())["pinned"] is True and "unpinned" not in json.loads(record.read_text())
    change(clone, run__unpinned=True)
    pinned = {**determinism(clone), "OMP_NUM_THREADS": "1"}
    assert launch(clone, **pinned).returncode == 0
    said = json.loads(record.read_text())
    assert said["unpinned"] == "OMP_NUM_THREADS=1" and said["pinned"] is False


@pytest.mark.parametrize(("value", "said"), [("AVX512", "ONEDNN_MAX_CPU_ISA=AVX512"), (None, "ONEDNN_MAX_CPU_ISA=nothing")])
def test_a_stage_refuses_an_environment_that_could_make_other_bits(clone, value, said):
    stage = [sys.executable, "-m", "stages.harness.run_stage", "fetch", "--scratch", "scratch", "--out", "scratch/raw"]
    environment = {"PATH": os.environ["PATH"], **determinism(clone), "ONEDNN_MAX_CPU_ISA": value}
    given = {name: text for name, text in environment.items() if text is not None}
    done = subprocess.run(stage, cwd=clone, env=given, capture_output=True, text=True)
    assert done.returncode == 2 and not (clone / "scratch").exists()
    assert f"the environment has {said} where docker/determinism.env has AVX2" in done.stderr and "Traceback" not in done.stderr


def test_the_key_in_the_record_is_the_key_of_the_lock_entry(clone):
    done = dvc(clone, "repro", "fetch")
    assert done.returncode == 0, done.stderr
    record = json.loads((clone / "results/timing/fetch.json").read_text())
    assert lock_keys(clone)["fetch"] == record["key"]


def test_how_a_stage_runs_changes_no_byte_of_the_lock_and_reruns_nothing(clone):
    dvc(clone, "repro", "fetch")
    before = (clone / "dvc.lock").read_bytes()
    change(clone, run__memory="9g", run__scratch=str(clone / "elsewhere"))
    done = dvc(clone, "repro", "fetch")
    assert "didn't change, skipping" in done.stdout + done.stderr
    assert (clone / "dvc.lock").read_bytes() == before
    done = dvc(clone, "repro", "--force", "fetch")
    assert done.returncode == 0 and (clone / "dvc.lock").read_bytes() == before


def test_a_changed_line_in_an_images_lock_reruns_the_stages_of_its_role_and_no_other(clone):
    small = {"fetch__sources__pretraining__rows": 500, "base_model__steps": 2, "base_model__architecture__layers": 1}
    change(clone, images__train="train", **small)
    done = dvc(clone, "repro", "prepare-mix")
    assert done.returncode == 0, done.stderr
    before = json.loads(dvc(clone, "status", "--json", "--with-deps", "prepare-mix").stdout)
    with (clone / "docker/train.lock").open("a") as file:
        file.write("# another pin\n")
    after = json.loads(dvc(clone, "status", "--json", "--with-deps", "prepare-mix").stdout)
    assert (before, list(after)) == ({}, ["base-model"])


def test_another_version_than_the_locks_is_a_loud_warning_and_is_recorded(clone):
    lock = clone / "docker/cpu.lock"
    lock.write_text(lock.read_text().replace("\npydantic==", "\npydantic==0.0."), encoding="utf-8")
    done = launch(clone)
    assert done.returncode == 0 and "WARNING" in done.stderr and "pydantic" in done.stderr
    assert json.loads((clone / "results/timing/fetch.json").read_text())["pinned"] is False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fetch__seeds": 3}, "params.yaml: unknown parameter fetch.seeds"),
        ({"fetch__steps": "many"}, "params.yaml: fetch.steps is 'many'"),
        ({"fetch__sources__test__rows": 10**7}, "ask for fewer"),
        ({"fetch__sources__test__split": "tset"}, "split 'tset' is unknown"),
        ({"run__engine": "podmen"}, "params.yaml: run.engine is 'podmen'"),
        ({"fetch__sources__rl__kind": "hub"}, "fetch.sources.rl: a hub source needs repo and split"),
        ({"fetch__sources__rl__kind": "local"}, "fetch.sources.rl: a local source needs file and sha256"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_and_loses_nothing(clone, changes, sentence):
    (clone / "data/raw").mkdir(parents=True)
    (clone / "data/raw/precious").write_text("kept")
    change(clone, **changes)
    done = launch(clone)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1
    assert (clone / "data/raw/precious").read_text() == "kept"


LOCAL = {"kind": "local", "schema": "gsm8k", "rows": None, "split": None, "columns": None, "file": "mine.jsonl",
         "sha256": None, "repo": None, "config": None}  # fmt: skip
GOOD_ROW = '{"question": "What is 1 and 1?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n'


def with_local_test(clone, text, sha256=None):
    import hashlib

    (clone / "data/local").mkdir(parents=True, exist_ok=True)
    (clone / "data/local/mine.jsonl").write_text(text, encoding="utf-8")
    found = hashlib.sha256(text.encode()).hexdigest()
    change(clone, fetch__sources__test={**LOCAL, "sha256": sha256 or found})


@pytest.mark.parametrize(
    ("text", "sha256", "sentence"),
    [
        (GOOD_ROW, "0" * 64, "mine.jsonl has sha256"),
        ('{"question": "no answer here"}\n', None, "row 1: no answer, which schema gsm8k needs"),
        ("{\n", None, "row 1: no JSON object"),
        ("", None, "holds no rows"),
    ],
)
def test_a_wrong_file_is_one_sentence(clone, text, sha256, sentence):
    with_local_test(clone, text, sha256)
    done = launch(clone)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (clone / "data/raw").exists()


def test_a_missing_file_says_where_to_put_it(clone):
    with_local_test(clone, GOOD_ROW)
    (clone / "data/local/mine.jsonl").unlink()
    done = launch(clone)
    assert done.returncode == 2 and "mine.jsonl is missing: put the file of source test there" in done.stderr


def test_dvc_s_lock_is_not_read_while_another_dvc_writes_it(clone):
    whole = (clone / "dvc.lock").read_bytes()
    (clone / ".dvc/tmp").mkdir(exist_ok=True)
    with (clone / ".dvc/tmp/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (clone / "dvc.lock").write_bytes(whole[: len(whole) // 2] + b'"')
        started = subprocess.Popen(FETCH, cwd=clone, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(2)
        assert started.poll() is None
        (clone / "dvc.lock").write_bytes(whole)
    assert started.wait() == 0, started.stderr.read()


def test_a_missing_input_names_the_file_and_the_command(clone):
    done = launch(clone, ["docker/run", "export", "prepare-mix", "--raw", "data/raw", "--tokenizer", "models/base", "--out", "data/mix"])
    assert done.returncode == 2 and "data/raw is missing: run the stage that writes it" in done.stderr


def test_a_command_that_dvc_yaml_does_not_hold_is_refused(clone):
    done = launch(clone, [*FETCH[:-1], "data/elsewhere"])
    assert done.returncode == 2 and "no stage of dvc.yaml has the command" in done.stderr


def small_disk_works():
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


@pytest.mark.skipif(not small_disk_works(), reason="no file system can be mounted here")
@pytest.mark.parametrize("full", ["scratch", "tree"])
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(clone, full):
    """The scratch folder fills up while the stage writes; or the tree's disk while its outs move into place."""
    (clone / "data/raw").mkdir(parents=True)
    (clone / "data/raw/precious").write_text("kept")
    disk = clone / ("disk" if full == "scratch" else "data")
    disk.mkdir(exist_ok=True)
    if full == "scratch":
        change(clone, run__scratch=str(disk))
        keep = ""
    else:
        change(clone, run__scratch=str(clone / "elsewhere"))
        keep = "mkdir data/raw && echo kept > data/raw/precious &&"
    mount = f"mount -t tmpfs -o size=256k none '{disk}'"
    after = "cat data/raw/precious; find data -name '.*incoming*'"
    command = f"{mount} && {keep} {{ {' '.join(FETCH)}; code=$?; {after}; exit $code; }}"
    done = launch(clone, ["unshare", "-rm", "bash", "-c", command])
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.strip() == "kept"


@pytest.mark.parametrize(
    ("number", "before"),
    [(signal.SIGINT, "trap - INT"), (signal.SIGINT, "trap '' INT"), (signal.SIGTERM, ":"), (signal.SIGKILL, ":")],
    ids=["SIGINT", "SIGINT that a background shell ignores", "SIGTERM", "SIGKILL"],
)
def test_a_killed_launcher_leaves_no_process_and_no_half_written_out(clone, number, before):
    change(clone, fetch__sources__pretraining__rows=60000)
    command = ["bash", "-c", f'{before}; exec "$@"', "bash", *FETCH]
    started = subprocess.Popen(command, cwd=clone, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((clone / ".dvc/tmp/mathmind/fetch").glob("*/outs/data/raw/*")) and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(number)
    started.communicate(timeout=20)
    assert started.returncode != 0
    assert_nothing_left(clone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("shell", ["dash", "bash"])  # one stands between dvc and the launcher, the other gives way
@pytest.mark.parametrize("program", ["dvc", "stages"])  # `mathmind repro` has workers between
def test_a_killed_dvc_leaves_no_process_and_no_half_written_out(clone, program, shell, number):
    only(clone, "fetch")
    change(clone, fetch__sources__pretraining__rows=60000)
    command = [sys.executable, "-m", program, "repro"]
    started = subprocess.Popen(command, cwd=clone, env=environment(SHELL=shutil.which(shell)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((clone / ".dvc/tmp/mathmind/fetch").glob("*/outs/data/raw/*")) and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(number)
    started.communicate(timeout=20)
    assert started.returncode == -number
    assert_nothing_left(clone)


@pytest.mark.parametrize("slow", ["docker/run", "python"])  # who called it is told by the one, and looked at by the other
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_dvc_killed_while_the_launcher_starts_leaves_nothing_running(clone, tmp_path, shell, slow):
    if slow == "python":
        script, goes_on = tmp_path / "python", f'exec {sys.executable} "$@"'
        more = {"MATHMIND_PYTHON": str(script)}
    else:
        (clone / "docker/run").rename(clone / "docker/run.py")
        script, goes_on = clone / "docker/run", 'exec docker/run.py "$@"'
        more = {}
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nsleep 2\n{goes_on}\n")
    script.chmod(0o755)
    command = [sys.executable, "-m", "dvc", "repro", "fetch"]
    started = subprocess.Popen(command, cwd=clone, env=environment(SHELL=shutil.which(shell), **more), start_new_session=True)
    while not (tmp_path / "started").exists() and started.poll() is None:
        time.sleep(0.01)
    started.kill()
    started.wait()
    time.sleep(3)
    assert_nothing_left(clone)


def assert_nothing_left(clone):
    deadline = time.monotonic() + 10
    while (left := processes_in(clone)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert not (clone / "data/raw").exists()
    assert launch(clone).returncode == 0
    assert scratch(clone) == []


def processes_in(folder):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder and b"run_stage" in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found
