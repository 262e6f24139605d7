"""dvc.yaml: complete, honest about what runs open, and read the same way by us and by DVC."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.harness.params import STAGES, read_params, section_of
from stages.host.graph import hash_of, lock_stages, read_graph, read_yaml, working_key
from tests.imports import ROOT, all_modules, imported_by, needed_by

PARAMS = read_params(ROOT / "params.yaml")
GRAPH = read_graph(ROOT, PARAMS)
LOCK = lock_stages(ROOT)
ROOMS = ("corpus", "training", "inference", "scoring")
KERNELS = Path("stages/inference/decode_attention.py")  # Triton compiles functions of a module; read where a GPU is, by vllm_engine.py alone


def stage_name(address):
    return address.partition("@")[0]


def test_the_graph_has_the_thirteen_stages():
    assert sorted({stage_name(address) for address in GRAPH}) == sorted(STAGES)


def test_every_stage_says_what_it_is_what_it_reads_and_what_it_writes():
    for entry in read_yaml(ROOT / "dvc.yaml")["stages"].values():
        body = entry.get("do", entry)
        assert {"desc", "cmd", "params", "deps"} <= body.keys() and {"outs", "metrics"} & body.keys()


@pytest.mark.parametrize("address", GRAPH)
def test_the_code_deps_of_a_stage_are_what_it_imports(address):
    name = stage_name(address)
    stage = Path(f"stages/{section_of(name)}.py")
    needed = {str(path) for path in needed_by(stage) | needed_by(Path("stages/harness/run_stage.py"))}
    declared = {dep for dep in GRAPH[address].deps if dep.startswith("stages/")}
    assert declared == needed, f"set the stages/ deps of {name} in dvc.yaml to {sorted(needed)}"


@pytest.mark.parametrize("address", GRAPH)
def test_a_stage_depends_on_its_image_and_its_environment(address):
    image = PARAMS["images"][GRAPH[address].command.split()[1]]
    recipe = {"docker/determinism.env", "docker/Dockerfile", "docker/uv.toml", f"docker/{image}.lock"}
    assert recipe <= set(GRAPH[address].deps)


@pytest.mark.parametrize("address", GRAPH)
def test_the_command_names_every_out_and_only_declared_inputs(address):
    stage = GRAPH[address]
    words = stage.command.split()[3:]
    outs = {path for option, path in zip(words[::2], words[1::2]) if option.startswith("--out")}
    inputs = {path for option, path in zip(words[::2], words[1::2]) if not option.startswith("--out")}
    assert outs == set(stage.outs)
    for path in inputs:
        assert any(dep == path or dep.startswith(path + "/") for dep in stage.deps), path


def test_package_files_are_empty_and_so_need_not_be_deps():
    assert all((ROOT / path).read_text() == "" for path in all_modules() if path.name == "__init__.py")


def test_imports_go_one_way():
    for path in all_modules():
        for needed in imported_by(path):
            room, wanted = path.parts[1], needed.parts[1]
            is_stage = len(path.parts) == 2 and room not in ("__main__.py", "__init__.py")
            assert not (room == "harness" and wanted != "harness"), f"{path} imports {needed}: harness knows nothing"
            assert not (room in (*ROOMS, "host") and len(needed.parts) == 2), f"{path} imports the stage {needed}"
            assert not (is_stage and len(needed.parts) == 2), f"{path} imports the stage {needed}"
            assert not (wanted == "host" and room not in ("host", "__main__.py")), f"{path} imports {needed}"
            assert not (room == "corpus" and wanted in ("training", "inference")), f"{path} imports {needed}"
            assert not (room == "scoring" and wanted in ("training", "inference")), f"{path} imports {needed}"


def test_no_module_imports_a_heavy_package_before_it_runs():
    modules = [".".join(path.with_suffix("").parts) for path in all_modules() if path.name != "__main__.py" and path != KERNELS]
    heavy = ["torch", "transformers", "trl", "peft", "llama_cpp", "datasets", "dvc", "scipy"]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_dvc_resolves_the_graph_as_we_do():
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        theirs = {
            stage.addressing: (
                " ".join(stage.cmd.split()),
                {dep.def_path for dep in stage.deps if type(dep).__name__ != "ParamsDependency"},
                {out.def_path for out in stage.outs},
            )
            for stage in repo.index.stages
            if stage.cmd
        }
    ours = {name: (stage.command, set(stage.deps), set(stage.outs)) for name, stage in GRAPH.items()}
    assert ours == theirs


def test_the_key_of_a_run_follows_what_it_is_made_of_and_not_how_it_is_run():
    stage = GRAPH["fetch"]
    key = working_key(ROOT, stage, PARAMS, LOCK)
    assert working_key(ROOT, stage, {**PARAMS, "run": {}}, LOCK) == key
    assert working_key(ROOT, stage, {**PARAMS, "seed": PARAMS["seed"] + 1}, LOCK) != key
    assert working_key(ROOT, replace(stage, deps=stage.deps[1:]), PARAMS, LOCK) != key
    assert working_key(ROOT, replace(stage, command=stage.command + " --more x"), PARAMS, LOCK) != key


def test_a_folder_s_hash_is_the_one_that_dvc_gives_it(tmp_path):
    from dvc.repo import Repo

    for name, text in {"b/c.txt": "one", "b.txt": "two", "ä.txt": ""}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(text, encoding="utf-8")
    ours = hash_of(tmp_path / "folder")
    (added,) = Repo.init(tmp_path, no_scm=True).add(str(tmp_path / "folder"))
    assert ours == added.outs[0].hash_info.value
