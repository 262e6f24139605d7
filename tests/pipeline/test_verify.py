"""`mathmind verify` in a small repository of two stages: the same, other bytes, and every flipped bit by its name."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.host.differences import Difference
from stages.host.graph import hash_of, lock_stages
from stages.host.verify import CLOSE, DIFFERENT, SAME, Finding, Verdict
from tests.pipeline.conftest import flip
from tests.pipeline.test_launcher import copy_of, dvc, environment, git, repository_with_a_base

WEIGHTS = "models/base/model.safetensors"
CURVE = "results/plots/base-model.csv"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return repository_with_a_base(tmp_path_factory.mktemp("verify") / "original", steps=25)


@pytest.fixture
def place(original, tmp_path):
    return copy_of(original, tmp_path / "a plaçe")  # whose path is not ASCII alone


def command(*arguments):
    return [sys.executable, "-m", "stages", "verify", *arguments]


def verify(folder, *arguments):
    return subprocess.run(command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "changed")


def test_what_is_committed_is_rebuilt_twice_to_the_same_bytes_and_the_clones_go(place):
    before = git(place, "status", "--porcelain")
    done = verify(place, "--twice", "--json")
    assert done.returncode == SAME, done.stderr
    said = json.loads(done.stdout)
    assert said["verdict"] == "same" and said["stages"] == ["fetch", "base-model"] and len(said["rebuilds"]) == 2
    assert not any(Path(clone).exists() for clone in said["rebuilds"])
    assert done.stderr.count("Running stage 'base-model'") == 2
    assert git(place, "status", "--porcelain") == before


def test_one_stage_is_rebuilt_from_the_inputs_in_the_cache(place):
    done = verify(place, "--stages", "base-model")
    assert done.returncode == SAME, done.stderr
    assert "every out of 1 stage is" in done.stdout and "Running stage 'fetch'" not in done.stderr


def in_the_lock(name, *path):
    """The text of dvc.lock in which one hash of a stage's entry has its last digit changed."""

    def damage(folder):
        entry = lock_stages(folder)[name]
        for step in path:
            entry = next(part for part in entry if part["path"] == step) if isinstance(entry, list) else entry[step]
        old = entry["md5"]
        stem, dot, rest = old.partition(".")
        new = stem[:-1] + ("0" if stem[-1] != "0" else "1") + dot + rest
        lines, inside = [], False
        for line in (folder / "dvc.lock").read_text().splitlines(keepends=True):
            if line.startswith("  ") and line[2] != " ":
                inside = line.strip() == f"{name}:"
            lines.append(line.replace(old, new) if inside else line)
        (folder / "dvc.lock").write_text("".join(lines))

    return damage


def of_a_parameter(folder):
    text = (folder / "dvc.lock").read_text()
    assert "steps: 25" in text
    (folder / "dvc.lock").write_text(text.replace("steps: 25", "steps: 24"))


def without_an_entry(folder):
    text = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(text[: text.index("  base-model:")])


@pytest.mark.parametrize(
    ("damage", "stage", "path"),
    [
        (in_the_lock("fetch", "deps", "stages/fetch.py"), "fetch", "stages/fetch.py"),
        (in_the_lock("fetch", "outs", "data/raw"), "fetch", "data/raw"),
        (in_the_lock("base-model", "deps", "data/raw"), "base-model", "data/raw"),
        (in_the_lock("base-model", "outs", "models/base"), "base-model", "models/base"),
        (in_the_lock("base-model", "outs", CURVE), "base-model", CURVE),
        (of_a_parameter, "base-model", "params.yaml"),
        (without_an_entry, "base-model", "dvc.lock"),
        (lambda folder: flip(folder / CURVE, 30), "base-model", CURVE),
        (lambda folder: flip(folder / "stages/base_model.py", 5), "base-model", "stages/base_model.py"),
    ],
    ids=["lock-dep", "lock-out", "lock-input", "lock-last-out", "lock-curve", "lock-parameter", "lock-entry", "curve", "code"],
)  # fmt: skip
def test_a_flipped_bit_of_what_is_committed_is_found_by_name_before_anything_is_rebuilt(place, damage, stage, path):
    damage(place)
    commit(place)
    done = verify(place, "--json")
    assert done.returncode == DIFFERENT, done.stderr
    said = json.loads(done.stdout)
    assert (stage, path) in [(finding["stage"], finding["path"]) for finding in said["findings"]], said
    assert said["rebuilds"] == []


@pytest.mark.parametrize(("file", "offset"), [(WEIGHTS, 20_000), ("models/base/config.json", 20), ("data/raw/sources.json", 10)])
def test_a_flipped_bit_of_an_out_in_the_folder_is_found_by_name(place, file, offset):
    flip(place / file, offset)
    done = verify(place)
    assert done.returncode == DIFFERENT
    assert f"{file}: in this folder is not what dvc.lock says" in done.stdout, done.stdout


def test_a_wrong_hash_that_nothing_here_contradicts_is_found_by_the_rebuild(place):
    in_the_lock("base-model", "outs", "models/base")(place)
    commit(place)
    subprocess.run(["rm", "-rf", str(place / "models/base")], check=True)
    done = verify(place)
    assert done.returncode == DIFFERENT, done.stderr
    assert "base-model: models/base: is " in done.stdout and "no longer holds" in done.stdout
    assert "the rebuild is kept in" in done.stdout


def test_a_stage_left_to_chance_is_named_with_file_tensor_distance_and_cause(place):
    source = place / "stages/training/pretraining.py"
    seeded = source.read_text()
    source.write_text(seeded.replace("torch.manual_seed(p.seed)", "torch.seed()"))
    assert source.read_text() != seeded
    assert dvc(place, "repro").returncode == 0
    commit(place)
    done = verify(place, "--json")
    assert done.returncode == DIFFERENT, done.stderr
    said = json.loads(done.stdout)
    first = said["findings"][0]
    assert (first["stage"], first["path"]) == ("base-model", "models/base")
    assert first["files"][0]["file"] == "model.safetensors" and first["files"][0]["far"] > 0.1
    assert "tensor model.embed_tokens.weight differs by" in first["how"]
    assert [finding["path"] for finding in said["findings"]] == ["models/base", CURVE]
    assert any("machine and packages are the same" in cause for cause in said["causes"])


def test_an_interrupted_rebuild_goes_on_where_it_stopped(place):
    with (place / "log").open("w") as log:
        running = subprocess.Popen(command(), cwd=place, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "Running stage 'base-model'" not in (place / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        running.kill()
        running.wait()
    done = verify(place)
    assert done.returncode == SAME, done.stderr
    assert "Stage 'fetch' didn't change, skipping" in done.stderr


def test_a_failing_rebuild_and_wrong_questions_get_one_sentence(place, tmp_path):
    (place / "dvc.lock").write_text("stages: {fetch: [")
    commit(place)
    damaged = verify(place)
    assert damaged.returncode == 2 and "HEAD's dvc.lock is damaged" in damaged.stderr and "Traceback" not in damaged.stderr
    git(place, "reset", "--quiet", "--hard", "HEAD~1")
    unknown = verify(place, "--stages", "qlora2")
    assert unknown.returncode == 2 and "dvc.yaml has no stage qlora2" in unknown.stderr
    outside = subprocess.run(command(), cwd=tmp_path, env=environment(PYTHONPATH=str(place)), capture_output=True, text=True)
    assert outside.returncode == 2 and "is not a git repository" in outside.stderr
    source = place / "stages/base_model.py"
    source.write_text(source.read_text() + "\nraise SystemExit(3)\n")
    lock = (place / "dvc.lock").read_text()
    md5 = next(dep["md5"] for dep in lock_stages(place)["base-model"]["deps"] if dep["path"] == "stages/base_model.py")
    (place / "dvc.lock").write_text(lock.replace(md5, hash_of(source)))
    commit(place)
    failed = verify(place)
    assert failed.returncode == 2 and "the rebuild in" in failed.stderr and "Traceback" not in failed.stderr


def finding(far, path="models/base"):
    return Finding("base-model", path, "differs", (Difference("model.safetensors", "differs", far),))


@pytest.mark.parametrize(
    ("findings", "other_machine", "status"),
    [
        ((), False, SAME),
        ((), True, SAME),
        ((finding(1e-6),), True, CLOSE),
        ((finding(1e-6),), False, DIFFERENT),
        ((finding(1e-6), finding(1e-6, "metrics.json")), True, DIFFERENT),
        ((finding(1e-6), finding(0.1)), True, DIFFERENT),
        ((Finding("fetch", "data/raw", "is another"),), True, DIFFERENT),
    ],
)
def test_only_rounding_on_another_machine_is_called_close(findings, other_machine, status):
    verdict = Verdict("c" * 40, ("base-model",), (), findings, other_machine=other_machine)
    assert verdict.status == status
