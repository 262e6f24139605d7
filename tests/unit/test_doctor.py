"""`mathmind doctor`: what is missing for the chosen profile is said, with what mends it, and fails; other things are notes."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from stages.host.engines import image_file
from tests.imports import ROOT


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("images"))
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def doctor(tree, profile, *options, **variables):
    shutil.copy2(tree / f"params/{profile}.yaml", tree / "params.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "stages", "doctor", *options]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_the_embedded_profile_finds_all_it_needs_here(tree, hub):
    done = doctor(tree, "embedded", "--json", HF_ENDPOINT=hub)
    found = {line["subject"]: line for line in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert found["profile embedded (chosen)"]["state"] == "ok" and found["native packages"]["state"] == "ok"
    assert found["hub"]["state"] == "ok" and hub in found["hub"]["found"]
    assert found["image cpu"]["state"] == "ok" or found["image cpu"]["fix"] == "docker/build cpu"


@pytest.mark.parametrize(("name", "last"), [(".dvc/tmp/rwlock", ""), (".dvc/tmp/rwlock", "data"), ("dvc.lock", "    dep"), ("dvc.lock", "size:")])
def test_a_file_of_dvcs_that_a_kill_cut_off_is_named_and_mended_by_what_is_said(tree, name, last):
    whole = {".dvc/tmp/rwlock": '{"write": {"data/raw": {"pid": 1, "cmd": "dvc repro"}}}', "dvc.lock": (ROOT / "dvc.lock").read_text()}[name]
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(whole)
    for command in (["init", "-q"], ["add", "--force", name], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "whole"]):
        subprocess.run(["git", *command], cwd=tree, check=True)

    def own_files():
        found = json.loads(doctor(tree, "embedded", "--json").stdout)[0]
        assert found["subject"] == "DVC's own files"
        return found

    assert own_files()["state"] == "ok"
    (tree / name).write_text(whole[: whole.index(last) + len(last)])
    cut_off = own_files()
    assert cut_off["state"] == "missing" and f"{name} is cut off" in cut_off["found"]
    subprocess.run(cut_off["fix"], shell=True, cwd=tree, check=True)
    assert own_files()["state"] == "ok"


def test_what_the_chosen_profile_misses_fails_and_says_how_to_mend_it(tree):
    profile = tree / "params/report-t4.yaml"
    profile.write_text(profile.read_text(encoding="utf-8").replace("gpus: 1", "gpus: 4"), encoding="utf-8")
    done = doctor(tree, "report-t4", "--json", HF_ENDPOINT="http://127.0.0.1:9", PATH=os.path.dirname(sys.executable), HF_TOKEN="planted")
    found = {line["subject"]: line for line in json.loads(done.stdout)}
    assert done.returncode == 1 and "planted" not in done.stdout + done.stderr
    assert found["docker"]["state"] == "missing" and "run.engine: native" in found["docker"]["fix"]
    assert found["podman"]["state"] == "note"
    assert found["image rollout"]["fix"] == "docker/build rollout"
    assert "a GPU of 15 GiB" in found["profile report-t4 (chosen)"]["fix"] and "4 GPUs (run.gpus)" in found["profile report-t4 (chosen)"]["fix"]
    assert found["hub"]["state"] == "missing" and "out of reach" in found["hub"]["found"]
    assert found["source base-model"]["found"] == "Qwen/Qwen1.5-4B is not pinned"
    assert found["source base-model"]["fix"] == "mathmind pin base-model"
    assert found["source rl"]["found"] == "open-r1/DAPO-Math-17k-Processed en/train is not pinned"
    assert all(line["fix"] for line in found.values() if line["state"] == "missing")


PINNED = """\
models:
  Qwen/Qwen1.5-4B: {commit: %s, license: other, license_name: tongyi-qianwen-research, gated: false, files: {}}
datasets:
  openai/gsm8k: {commit: %s, license: mit, gated: auto, files: {main/test: {}}}
""" % ("a" * 40, "b" * 40)


def test_what_is_pinned_is_shown_with_its_terms_and_gated_sources_want_a_token(tree, hub):
    (tree / "params/sources.lock.yaml").write_text(PINNED)
    for token in ("", "planted"):
        done = doctor(tree, "report-t4", "--json", HF_ENDPOINT=hub, HF_TOKEN=token)
        found = {line["subject"]: line for line in json.loads(done.stdout)}
        assert found["source base-model"]["found"] == "Qwen/Qwen1.5-4B at aaaaaaaaaaaa, licence other (tongyi-qianwen-research)"
        assert found["source test"]["found"] == "openai/gsm8k main/test at bbbbbbbbbbbb, licence mit, gated (auto)"
        assert found["source test"]["state"] == ("ok" if token else "missing")
        assert found["source test"]["fix"] == ("" if token else f"accept its terms at {hub}/datasets/openai/gsm8k and set HF_TOKEN")
        assert "planted" not in done.stdout


def test_a_damaged_lock_of_sources_is_a_line_and_no_crash(tree, hub):
    (tree / "params/sources.lock.yaml").write_text("datasets: [")
    done = doctor(tree, "embedded", "--json", HF_ENDPOINT=hub)
    found = {line["subject"]: line for line in json.loads(done.stdout)}
    assert done.returncode == 0 and "sources.lock.yaml: line 1" in found["sources"]["found"]


def test_packages_that_the_lock_does_not_pin_are_named(tree):
    lock = tree / "docker/cpu.lock"
    lock.write_text(lock.read_text().replace("\npydantic==", "\npydantic==0.0."))
    done = doctor(tree, "embedded", "--json")
    (packages,) = [line for line in json.loads(done.stdout) if line["subject"] == "native packages"]
    assert done.returncode == 1 and packages["state"] == "missing" and "pydantic" in packages["found"]
    assert packages["fix"] == "make .venv"


def test_the_packages_are_those_of_the_python_that_runs_stages(tree, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    for python, said in ((tmp_path / "bare/bin/python", "No module named 'pydantic'"), (tmp_path / "none/python", "No such file")):
        done = doctor(tree, "scratch-gpu", "--json", MATHMIND_PYTHON=str(python))
        (packages,) = [line for line in json.loads(done.stdout) if line["subject"] == "native packages"]
        assert packages["state"] == "missing" and str(python) in packages["found"] and said in packages["found"] and packages["fix"]


def test_a_scratch_folder_that_no_stage_has_made_yet_is_nothing_to_mend(tree, hub):
    profile = tree / "params/embedded.yaml"
    profile.write_text(profile.read_text().replace("scratch: null", "scratch: /nowhere/yet"))
    assert doctor(tree, "embedded", "--json", HF_ENDPOINT=hub).returncode == 0


def test_the_screen_shows_the_same(tree, hub):
    done = doctor(tree, "embedded", HF_ENDPOINT=hub)
    assert done.returncode == 0 and "profile embedded (chosen)" in done.stdout and hub in done.stdout


def test_apptainer_is_spoken_of_where_it_is_asked_for_and_names_the_file_that_it_lacks(tree):
    profile = tree / "params/embedded.yaml"
    profile.write_text(profile.read_text(encoding="utf-8").replace("engine: native", "engine: apptainer"), encoding="utf-8")
    file = image_file(tree, "cpu")
    for made in (False, True):
        if made:
            (tree / file).parent.mkdir()
            (tree / file).write_bytes(b"an image")
        done = doctor(tree, "embedded", "--json", HF_ENDPOINT="http://127.0.0.1:9", PATH=os.path.dirname(sys.executable))
        found = {line["subject"]: line for line in json.loads(done.stdout)}
        assert done.returncode == 1 and found["apptainer"]["state"] == "missing" and found["image cpu"]["state"] == ("ok" if made else "missing")
    assert found["image cpu"]["found"].startswith(f"{file}, ")
