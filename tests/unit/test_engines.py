"""What an engine is given to run, without an engine: mounts, environments, who may ask the hub."""

import csv

import pytest

from stages.harness.params import Run, read_params
from stages.host.engines import Job, Native, _link_targets, _mount, hub_stages
from stages.host.graph import read_graph
from tests.imports import ROOT

PARAMS = read_params(ROOT / "params.yaml")
GRAPH = read_graph(ROOT, PARAMS)


def job(tmp_path, *, asks_hub, gpus=0):
    settings = Run(engine="docker", gpus=gpus, processes=None, nodes=1, rendezvous=None, workers=None, memory=None, scratch=None,
                   local_files="data/local", unpinned=False)  # fmt: skip
    stage = GRAPH["fetch"]
    return Job(image="cpu", stage=stage, arguments=tuple(stage.command.split()[2:]), settings=settings, tree=ROOT,
               local_files=tmp_path / "mine", scratch=tmp_path / "key", lock=tmp_path / "key.lock", asks_hub=asks_hub)  # fmt: skip


def test_a_mount_is_one_csv_row_whatever_the_path(tmp_path):
    folder = tmp_path / 'spaces, commas and "quotes"'
    (fields,) = csv.reader([_mount(folder, writable=False)])
    assert fields == ["type=bind", f"source={folder}", f"target={folder}", "readonly"]
    assert "readonly" not in _mount(folder, writable=True)


def test_outs_go_to_the_scratch_folder_and_inputs_stay(tmp_path):
    command = job(tmp_path, asks_hub=False).command("python")
    assert command[:4] == ["python", "-m", "stages.harness.run_stage", "fetch"]
    assert command[command.index("--out") + 1] == str(tmp_path / "key/outs/data/raw")
    assert command[command.index("--sources-lock") + 1] == "params/sources.lock.yaml"


def test_the_token_goes_only_to_a_stage_that_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("WANDB_API_KEY", "planted too")
    assert job(tmp_path, asks_hub=True).hub_environment() == {"HF_TOKEN": "planted"}
    assert job(tmp_path, asks_hub=False).hub_environment() == {}
    assert "planted" not in str(job(tmp_path, asks_hub=True).environment())


def test_only_a_stage_that_asks_the_hub_is_online_and_it_asks_the_callers_mirror(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    asking, other = job(tmp_path, asks_hub=True), job(tmp_path, asks_hub=False)
    assert asking.hub_environment() == {"HF_ENDPOINT": "https://mirror.example"}
    assert [one.environment()["HF_HUB_OFFLINE"] for one in (asking, other)] == ["0", "1"]


@pytest.mark.parametrize(("seen", "gpus", "given"), [(None, 1, "0"), ("3,5", 1, "3"), ("3,5", 0, ""), (None, 2, "0,1")])
def test_a_stage_sees_as_many_gpus_as_the_profile_asks_for(tmp_path, monkeypatch, seen, gpus, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert Native(job(tmp_path, asks_hub=False, gpus=gpus)).environment()["CUDA_VISIBLE_DEVICES"] == given


@pytest.mark.parametrize(("profile", "stages"), [("embedded", set()), ("report-t4", {"fetch", "base-model"})])
def test_only_profiles_with_hub_sources_ask_the_hub(profile, stages):
    assert hub_stages(read_params(ROOT / f"params/{profile}.yaml")) == stages


def test_links_out_of_the_tree_name_the_folder_of_the_cache(tmp_path):
    cache = tmp_path / "cache/files/md5/ab"
    cache.mkdir(parents=True)
    (cache / "cdef").write_text("x")
    tree = tmp_path / "tree"
    (tree / "data/raw").mkdir(parents=True)
    (tree / "data/raw/linked").symlink_to(cache / "cdef")
    (tree / "data/raw/inside").symlink_to(tree / "data")
    assert _link_targets(tree, ("data/raw",)) == {tmp_path / "cache/files/md5"}


def test_each_role_of_a_profile_depends_on_its_own_lock():
    values = read_params(ROOT / "params/report-t4.yaml")
    graph = read_graph(ROOT, values)
    on = {lock: {name.partition("@")[0] for name, stage in graph.items() if f"docker/{lock}.lock" in stage.deps}
          for lock in ("train", "rollout", "export")}  # fmt: skip
    assert on == {
        "train": {"base-model", "sft", "qlora", "orpo", "merge"},
        "rollout": {"preference-pairs", "grpo", "eval"},
        "export": {"fetch", "prepare-mix", "gguf-export", "eval-gguf", "compare"},
    }


def test_every_base_image_is_pinned_by_digest():
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        if line.startswith(("ARG SLIM=", "ARG CUDA=")):
            assert "@sha256:" in line
        if line.startswith("FROM "):
            assert line.split()[1] in ("${SLIM}", "${CUDA}", "cuda", "base-of-${IMAGE}", "python"), line
