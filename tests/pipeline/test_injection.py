"""A parameter is text and never a command: whatever it holds, no shell runs it, in a real clone with a real `dvc repro`."""

import hashlib
import shutil

import pytest

from tests.pipeline.test_launcher import GOOD_ROW, LOCAL, change, copy_of_the_tree, dvc, only

COMMAND = "x; rm -rf canary; $(rm -rf canary) `rm -rf canary` #"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A small graph, and all that a command in a parameter would need in order to get as far as a shell."""
    folder = tmp_path_factory.mktemp("injection") / "clone"
    copy_of_the_tree(folder)
    only(folder, "fetch", "base-model")
    shutil.copy(folder / "docker/cpu.lock", folder / f"docker/{COMMAND}.lock")
    for place in (folder / "data/local", folder / COMMAND):
        place.mkdir()
        for name in ("mine", COMMAND):
            (place / f"{name}.jsonl").write_text(GOOD_ROW)
    return folder


def local(file):
    return {**LOCAL, "file": file, "sha256": hashlib.sha256(GOOD_ROW.encode()).hexdigest()}


def hub(repo):
    return {**LOCAL, "kind": "hub", "file": None, "repo": repo, "split": "test"}


CASES = [
    ({"images__export": COMMAND}, "fetch", "params.yaml: images.export is "),
    ({"images__train": COMMAND}, "base-model", "params.yaml: images.train is "),
    ({"run__engine": COMMAND}, "fetch", "params.yaml: run.engine is "),
    ({"run__scratch": COMMAND}, "fetch", None),
    ({"run__local_files": COMMAND, "fetch__sources__test": local("mine.jsonl")}, "fetch", None),
    ({"fetch__sources__test": local(f"{COMMAND}.jsonl")}, "fetch", None),
    ({"fetch__sources__rl": hub(COMMAND)}, "fetch", "params/sources.lock.yaml pins no commit of "),
    ({"base_model__repo": COMMAND, "base_model__kind": "hub"}, "base-model", "params/sources.lock.yaml pins no commit of "),
    ({"fetch__sources": {"../../escaped": local("mine.jsonl")}}, "fetch", "fetch.sources.../../escaped"),
    ({"tracking__project": COMMAND}, "fetch", None),
    ({"profile": COMMAND}, "fetch", None),
]


@pytest.mark.parametrize(("changes", "stage", "sentence"), CASES, ids=[next(iter(case[0])).replace("__", ".") for case in CASES])
def test_a_command_in_a_parameter_is_never_run(clone, changes, stage, sentence):
    """Where it can be what the parameter is for, a folder's or file's name, it is that; else one sentence refuses it."""
    shutil.copy(clone / "params/embedded.yaml", clone / "params.yaml")
    change(clone, fetch__sources__pretraining__rows=500, base_model__steps=1, base_model__architecture__layers=1)
    change(clone, **changes)
    (clone / "canary").mkdir(exist_ok=True)
    (clone / "canary/song").touch()
    done = dvc(clone, "repro", "--force", stage)
    assert (clone / "canary/song").exists(), "the command was run"
    assert (done.returncode == 0) == (sentence is None), done.stderr
    assert (sentence or "") in done.stderr and "Traceback" not in done.stderr, done.stderr
