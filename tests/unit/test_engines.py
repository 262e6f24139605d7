"""What an engine is given to run, without an engine: mounts, environments, who may ask the hub."""

import csv
import os
from dataclasses import replace

import pytest

from stages.harness.errors import InputError
from stages.harness.params import Run, read_params
from stages.harness.ranks import SHARDED
from stages.host.engines import Apptainer, Job, Native, _link_targets, _mount, hub_stages, image_file, spreads
from stages.host.graph import read_graph
from stages.host.launcher import hold_to_sense, rollout_gpus, warn_of_threads
from tests.imports import ROOT

PARAMS = read_params(ROOT / "params.yaml")
GRAPH = read_graph(ROOT, PARAMS)


def job(tmp_path, *, asks_hub=False, spreads=False, held=(), name="fetch", **run):
    alone = {"gpus": len(held), "processes": None, "rollout_gpus": None, "nodes": 1, "rendezvous": None, "sharded": None}
    settings = Run(engine="docker", **{**alone, **run}, workers=None, memory=None, scratch=None, local_files="data/local", unpinned=False)
    stage = GRAPH[name]
    return Job(image="cpu", stage=stage, arguments=tuple(stage.command.split()[2:]), settings=settings, tree=ROOT, main_tree=tmp_path,
               local_files=tmp_path / "mine", scratch=tmp_path / "key", lock=tmp_path / "key.lock", asks_hub=asks_hub,
               spreads=spreads, gpus=held, key="abc")  # fmt: skip


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


def test_a_stage_sees_the_gpus_that_the_launcher_holds_for_it_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Native(job(tmp_path, asks_hub=False, held=["5"])).environment()["CUDA_VISIBLE_DEVICES"] == "5"
    assert Native(job(tmp_path, asks_hub=False)).environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert job(tmp_path, held=["3", "5"]).environment()["CUDA_VISIBLE_DEVICES"] == "0,1"  # as its container numbers them


def apptainer(tmp_path, monkeypatch, recipe, **more):
    """The engine where a program of its name tells of an image by this recipe."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir(exist_ok=True)
    labels = f'"org.opencontainers.image.version": "{recipe}", "org.label-schema.build-date": "today"'
    program.write_text(f"#!/bin/sh\necho '{{\"data\": {{\"attributes\": {{\"labels\": {{{labels}}}}}}}}}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return Apptainer(job(tmp_path, **more))


def test_apptainer_gets_a_closed_container_and_its_variables_by_their_prefix(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    file = tmp_path / image_file(ROOT, "cpu")
    with pytest.raises(InputError, match=rf"{file.name} is missing: make it of docker's image, `apptainer build docker/images/{file.name} "):
        apptainer(tmp_path, monkeypatch, "")
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(InputError, match="was made by recipe 0123"):
        apptainer(tmp_path, monkeypatch, "0123")

    recipe = file.stem.removeprefix("cpu-")
    closed, asking = (apptainer(tmp_path, monkeypatch, recipe, asks_hub=asks, held=["5"]) for asks in (False, True))
    command = closed.command()
    assert command[4:7] == [str(tmp_path / "bin/apptainer"), "--quiet", "exec"] and command[command.index("--home") + 1] == str(tmp_path / "key/tmp")
    assert {"--containall", "--cleanenv", "--no-privs", "--nv"} <= set(command)
    assert command[command.index("--network") + 1] == "none" and "--network" not in asking.command()
    writable = [_mount(folder, writable=True) for folder in (tmp_path / "key", tmp_path.parent / "kernels/docker-cpu")]
    assert [field for field in command if field.startswith("type=bind")] == [_mount(ROOT, writable=False), *writable]
    assert command[command.index(str(file)) :][1:4] == ["python", "-m", "stages.harness.run_stage"]
    given = {name: value for name, value in closed.environment().items() if name.startswith("APPTAINERENV_")}
    assert given["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == "5" and given["APPTAINERENV_HF_HUB_OFFLINE"] == "1"
    assert "APPTAINERENV_HOME" not in given and "planted" not in given.values()
    assert closed.pinned is False


@pytest.mark.parametrize(("name", "run", "wanted"), [("sft", {"gpus": 4}, 4), ("eval@base", {"gpus": 4}, 1), ("sft", {"gpus": 4, "processes": 2}, 2),
                                                    ("sft", {"gpus": 0}, 0), ("sft", {"gpus": 0, "processes": 2}, 0)])  # fmt: skip
def test_a_stage_takes_a_gpu_for_each_of_its_processes(tmp_path, name, run, wanted):
    assert job(tmp_path, name=name, **run).gpus_wanted == wanted


@pytest.mark.parametrize(("gpus", "processes"), [(4, None), (4, 2), (0, 2), (1, None)])
def test_one_process_that_spreads_takes_all_gpus_however_many_processes_train(tmp_path, gpus, processes):
    spread = job(tmp_path, name="eval@base", spreads=True, gpus=gpus, processes=processes)
    assert spread.gpus_wanted == gpus and spread.command("python")[2] == "stages.harness.run_stage"


@pytest.mark.parametrize(("profile", "changes", "found"), [
    ("embedded", {}, {"eval"}),  # preference-pairs of the base, by transformers, whose samples depend on those before
    ("embedded", {"engine": "vllm"}, {"eval", "preference-pairs"}),
    ("report-h200", {}, {"eval"}),  # pairs that others made
    ("report-h200", {"origin": "base"}, {"eval", "preference-pairs"}),
])  # fmt: skip
def test_answers_are_spread_over_gpus_where_they_do_not_depend_on_each_other(profile, changes, found):
    values = read_params(ROOT / f"params/{profile}.yaml")
    values["preference_pairs"] |= changes
    assert {name.partition("@")[0] for name in GRAPH if spreads(name, values)} == found


@pytest.mark.parametrize(("name", "run", "begins"), [
    ("sft", {}, ["stages.harness.run_stage", "sft"]),
    ("sft", {"gpus": 1}, ["stages.harness.run_stage", "sft"]),
    ("merge@sft", {"gpus": 4}, ["stages.harness.run_stage", "merge"]),
    ("sft", {"gpus": 4}, ["stages.harness.run_ranks", "--processes", "4", "--run", "abc", "sft"]),
    ("orpo", {"processes": 2}, ["stages.harness.run_ranks", "--processes", "2", "--run", "abc", "orpo"]),
    ("qlora", {"nodes": 2, "rendezvous": "first:29400"},
     ["stages.harness.run_ranks", "--processes", "1", "--run", "abc", "--nodes", "2", "--node", "0", "--rendezvous", "first:29400", "qlora"]),
])  # fmt: skip
def test_a_stage_that_trains_starts_as_many_processes_as_it_has_gpus_or_is_told(tmp_path, name, run, begins):
    command = job(tmp_path, name=name, **run).command("python")
    assert command[2 : 2 + len(begins)] == begins and command[2 + len(begins)] == "--scratch"


@pytest.mark.parametrize(("run", "apart", "processes", "wanted"), [
    ({"gpus": 4}, 0, 4, 4), ({"gpus": 4}, 2, 2, 4), ({"gpus": 2}, 1, 1, 2),
    ({"gpus": 4, "processes": 2}, 1, 2, 3), ({"gpus": 4, "processes": 4}, 2, 2, 4),
])  # fmt: skip
def test_engines_alone_on_a_gpu_leave_fewer_processes_to_train(tmp_path, run, apart, processes, wanted):
    asked = replace(job(tmp_path, name="grpo", **run), rollout_gpus=apart)
    assert (asked.processes, asked.gpus_wanted) == (processes, wanted)
    assert asked.environment().get("MATHMIND_ROLLOUT_GPUS") == (str(apart) if apart else None)


@pytest.mark.parametrize(("name", "run", "apart"), [
    ("grpo", {"gpus": 4, "rollout_gpus": 1}, 1), ("grpo", {"gpus": 4, "rollout_gpus": 0}, 0), ("grpo", {"gpus": 1}, 0),
    ("sft", {"gpus": 4, "rollout_gpus": 1}, 0),
])  # fmt: skip
def test_only_grpo_has_engines_alone_and_as_many_as_params_say(tmp_path, name, run, apart):
    assert rollout_gpus(job(tmp_path, name=name, **run), PARAMS) == apart


def test_machines_that_train_together_use_the_callers_choice_of_network_and_a_container_of_theirs_the_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    apart, alone = job(tmp_path, name="sft", nodes=2, rendezvous="first:29400"), job(tmp_path, name="sft", processes=2)
    assert apart.environment()["NCCL_SOCKET_IFNAME"] == "ib0" and "NCCL_SOCKET_IFNAME" not in alone.environment()


@pytest.mark.parametrize(("sharded", "told"), [(True, "true"), (False, "false"), (None, None)])
def test_a_stage_is_told_whether_to_share_the_base_out(tmp_path, sharded, told):
    assert job(tmp_path, name="qlora", processes=2, sharded=sharded).environment().get(SHARDED) == told


@pytest.mark.parametrize(("run", "sentence"), [
    ({"nodes": 2}, "run.nodes is 2 and run.rendezvous is null"),
    ({"gpus": 2, "rollout_gpus": 2}, "run.rollout_gpus is 2 and run.gpus 2: one GPU at least is to train"),
    ({"gpus": 2, "processes": 4}, "run.processes is 4 and run.gpus 2: each process needs a GPU of its own"),
    ({"gpus": 1, "sharded": True}, "run.sharded is true and one process has nobody to share the base with"),
])
def test_what_cannot_be_run_is_refused(tmp_path, run, sentence):
    with pytest.raises(InputError, match=sentence):
        hold_to_sense(job(tmp_path, **run).settings)


def test_more_threads_than_cores_are_told_for_the_stage_that_spins(capsys):
    cores = len(os.sched_getaffinity(0))
    for stage, threads in (("eval-gguf@base", cores), ("eval@base", cores + 1), ("eval-gguf@base", cores + 1)):
        warn_of_threads(stage, {**PARAMS, "eval_gguf": {**PARAMS["eval_gguf"], "threads": threads}})
    (told,) = capsys.readouterr().err.splitlines()
    assert f"eval_gguf.threads is {cores + 1}, more than the stage's cores ({cores})" in told


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
