"""What made an out, and the statement about it, in a folder with a lock of three stages."""

import json
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console
from ruamel.yaml import YAML

from stages.__main__ import main
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json
from stages.host.explain import as_json, as_tree, attest, check, explain
from stages.host.graph import entry_key, hash_of, lock_stages


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """fetch -> base-model -> sft, which reads the base and the data."""
    monkeypatch.chdir(tmp_path)
    files = {"stages/sft.py": "code", "docker/cpu.lock": "torch==1", "data/raw/rows.jsonl": "{}", "models/base/model.safetensors": "b",
             "models/sft/adapter.safetensors": "a", "models/sft/config.json": "{}"}  # fmt: skip
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    write_json(tmp_path / "data/raw/sources.json", {"chat": {"kind": "hub", "repo": "some/chat", "revision": "abc123", "rows": 7}})

    def entry(cmd, deps, out, **params):
        listed = [{"path": path, "hash": "md5", "md5": hash_of(tmp_path / path)} for path in deps]
        outs = [{"path": out, "hash": "md5", "md5": hash_of(tmp_path / out)}]
        return {"cmd": f"docker/run cpu {cmd}", "deps": listed, "params": {"params.yaml": params}, "outs": outs}

    stages = {
        "fetch": entry("fetch", [], "data/raw", seed=0),
        "base-model": entry("base-model", ["data/raw", "docker/cpu.lock"], "models/base", seed=0),
        "sft": entry("sft", ["data/raw", "models/base", "stages/sft.py"], "models/sft", seed=0, sft={"lr": 0.002, "backend": None}),
    }
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)
    write_json(tmp_path / "results/timing/sft.json", {
        "stage": "sft", "key": entry_key(stages["sft"]), "seconds": 12.5, "engine": "native", "image": "cpu", "recipe": "r1",
        "python": "3.11.7", "pinned": True, "level": "bitwise", "machine": {"cpu": "Some CPU", "gpus": ["Some GPU, 580"]},
    })  # fmt: skip
    return tmp_path


def shown(tree, path):
    console = Console(file=StringIO(), width=400)
    console.print(as_tree(explain(tree, path)))
    return console.file.getvalue()


def test_an_out_is_told_back_to_its_sources_and_what_two_stages_read_once(tree):
    text = shown(tree, "models/sft")
    for part in ("sft.lr=0.002", "seed=0", "repo=some/chat", "revision=abc123", "rows=7", "native, image cpu, recipe r1, Python 3.11.7",
                 "packages as pinned", "Some CPU; Some GPU, 580", "bits: bitwise", "data/raw (above)"):  # fmt: skip
        assert part in text, text
    assert text.count("stage fetch:") == 1 and "backend" not in text


def test_a_file_is_explained_by_the_out_it_lies_in(tree):
    assert explain(tree, "models/sft/config.json").path == explain(tree, "models/sft/").path == "models/sft"


def test_code_that_is_another_here_now_is_named(tree):
    (tree / "stages/sft.py").write_text("other code")
    assert explain(tree, "models/sft").changed == ("stages/sft.py",)
    assert "of which stages/sft.py are other here now" in shown(tree, "models/sft")


def test_the_record_of_another_run_is_not_taken_for_this_ones(tree):
    record = json.loads((tree / "results/timing/sft.json").read_text())
    write_json(tree / "results/timing/sft.json", {**record, "key": "another"})
    assert explain(tree, "models/sft").record == {}
    assert "run: no record of it is here" in shown(tree, "models/sft")


def test_json_holds_all_of_it(tree):
    said = json.loads(json.dumps(as_json(explain(tree, "models/sft"))))
    assert said["inputs"][1]["inputs"][0]["data"]["chat"]["revision"] == "abc123"
    assert set(said["files"]) == {"stages/sft.py"} and said["key"] == said["record"]["key"]


def test_what_no_stage_wrote_is_refused_in_one_sentence(tree):
    with pytest.raises(InputError, match="models/other is no out that dvc.lock holds"):
        explain(tree, "models/other")


@pytest.fixture
def statement(tree):
    file = tree / "sft.intoto.json"
    assert attest(tree, "models/sft", file) == 2
    return file


def test_a_statement_is_in_totos_with_slsas_predicate_and_holds(tree, statement):
    said = json.loads(statement.read_text())
    assert said["_type"] == "https://in-toto.io/Statement/v1" and said["predicateType"] == "https://slsa.dev/provenance/v1"
    assert [part["name"] for part in said["subject"]] == ["models/sft/adapter.safetensors", "models/sft/config.json"]
    definition = said["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["parameters"]["sft"]["lr"] == 0.002
    assert {part["name"] for part in definition["resolvedDependencies"]} == {"stages/sft.py", "data/raw", "models/base"}
    assert check(tree, statement) == []


def test_what_does_not_hold_is_named(tree, statement):
    (tree / "models/sft/adapter.safetensors").write_text("b")
    (tree / "models/sft/config.json").unlink()
    changed, missing = check(tree, statement)
    assert "models/sft/adapter.safetensors has sha256" in changed and missing == "models/sft/config.json is missing"


def test_a_lock_of_another_run_is_named(tree, statement):
    text = (tree / "dvc.lock").read_text()
    (tree / "dvc.lock").write_text(text.replace("lr: 0.002", "lr: 0.003"))
    assert lock_stages(tree)["sft"]["params"]["params.yaml"]["sft"]["lr"] == 0.003
    assert check(tree, statement) == ["dvc.lock holds another run of sft than the statement is about"]


def test_a_statement_never_makes_us_read_outside_the_folder(tree, statement):
    said = json.loads(statement.read_text())
    said["subject"][0]["name"], said["subject"][1]["name"] = "../secret", "/etc/hostname"
    write_json(statement, said)
    assert all("lies outside this folder" in sentence for sentence in check(tree, statement))


@pytest.mark.parametrize("damage", [{"_type": "other"}, {"subject": []}, {"more": 1}, {"predicate": {}}])
def test_another_kind_of_file_is_refused_with_the_place(tree, statement, damage):
    write_json(statement, {**json.loads(statement.read_text()), **damage})
    with pytest.raises(InputError, match="is no statement"):
        check(tree, statement)


def test_an_out_that_is_not_what_the_lock_says_is_not_attested(tree):
    (tree / "models/sft/config.json").write_text("{ }")
    with pytest.raises(InputError, match="models/sft is not what dvc.lock says"):
        attest(tree, "models/sft", tree / "sft.json")
    assert not (tree / "sft.json").exists()


def test_the_command_asks_for_an_out_or_a_statement_and_tells_by_its_exit(tree, statement):
    run = CliRunner().invoke
    assert run(main, ["explain"]).exit_code == run(main, ["explain", "models/sft", "--check", str(statement)]).exit_code == 2
    assert run(main, ["explain", "--check", str(statement)]).exit_code == 0
    (tree / "models/sft/config.json").write_text("x")
    done = run(main, ["explain", "--check", str(statement)])
    assert done.exit_code == 1 and "models/sft/config.json has sha256" in done.output
