"""What our own code never does, read from its source: nothing that it reads is run, and no shell sees what it is given.

What a user's parameters may hold is tried in tests/pipeline/test_injection.py, what a hub may send in tests/pipeline/test_hub.py.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.corpus.sources_lock import SourcesLock
from stages.host.graph import read_yaml
from tests.imports import ROOT

RUN_WHAT_THEY_LOAD = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle", "jsonpickle", "yaml"}
RUN_TEXT = {"eval", "exec", "compile"}  # the builtins; a method of such a name is another thing
START_A_SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}
START_A_PROGRAM = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
UNPACK = {"extract", "extractall", "unpack_archive"}


def sources() -> list[Path]:
    """Every Python file of ours that is no test, scripts without an ending too."""
    files = [path for folder in ("stages", "docker", "benchmarks") for path in (ROOT / folder).rglob("*") if path.is_file()]
    scripts = [path for path in files if not path.suffix and "python" in path.read_text("utf-8").split("\n")[0]]
    return [*scripts, *(path for path in files if path.suffix == ".py")]


def dangers(source: str) -> Iterator[str]:
    """What a text of Python does that ours may not, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom():
                found = _of_an_import(node)
            case ast.Call():
                found = _of_a_call(node)
            case ast.Constant(value="trust_remote_code"):
                found = ["trust_remote_code among options"]
            case _:
                found = []
        yield from (f"line {node.lineno}: {what}" for what in found)


def _of_an_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    yield from (f"import {name}" for name in names if name.split(".")[0] in RUN_WHAT_THEY_LOAD)
    if isinstance(node, ast.ImportFrom):  # so that calls are met under their whole names
        whole = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from sorted(whole & (START_A_SHELL | START_A_PROGRAM | {"torch.load", "numpy.load"}))


def _of_a_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    given = {word.arg: word.value for word in call.keywords}

    def says(option: str, value: object) -> bool:
        return option in given and ast.unparse(given[option]) == repr(value)

    if name in RUN_TEXT | START_A_SHELL or last in ("read_pickle", "__import__"):
        yield name
    if name in START_A_PROGRAM and call.args and _is_text(call.args[0]):
        yield f"{name} of a text"
    if name in START_A_PROGRAM and call.args and isinstance(call.args[0], ast.List):
        words = call.args[0].elts
        for before, word in zip(words, words[1:]):
            if ast.unparse(before) == "'-c'" and _is_text(word) and not isinstance(word, ast.Constant):
                yield f"{name} of a program that is put together"
    if "shell" in given and not says("shell", False):
        yield f"{name} with shell"
    if name == "torch.load" and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if "allow_pickle" in given and not says("allow_pickle", False):
        yield f"{name} with allow_pickle"
    if "trust_remote_code" in given and not says("trust_remote_code", False):
        yield f"{name} with trust_remote_code"
    if last == "YAML" and (call.args or "typ" in given and not says("typ", "safe")):  # the default runs nothing either
        yield "YAML that is neither typ='safe' nor the default"
    if last in UNPACK and not says("filter", "data"):
        yield f"{name} without filter='data'"


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_our_code_runs_nothing_that_it_reads_and_gives_no_shell_a_text(path):
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import load",
        "import yaml",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "eval(text)",
        "exec(text)",
        "__import__(text)",
        "os.system(text)",
        "subprocess.run('rm -rf ' + text, shell=True)",
        "subprocess.run(text, shell=asked)",
        "subprocess.run('ls')",
        "subprocess.Popen(f'ls {folder}')",
        "subprocess.run('ls ' + folder)",
        "subprocess.run(['sh', '-c', f'ls {folder}'])",
        "from subprocess import run",
        "YAML(typ='unsafe')",
        "YAML(typ=asked)",
        "YAML('unsafe')",
        "tarfile.open(path).extractall(folder)",
        "shutil.unpack_archive(path, folder)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked)",
        "AutoModel.from_pretrained(path, **{'trust_remote_code': True})",
    ],
)
def test_what_the_walk_is_there_to_find_is_found(planted):
    assert list(dangers(planted))


@pytest.mark.parametrize(
    "harmless",
    [
        "torch.load(path, weights_only=True)",
        "re.compile(pattern)",
        "model.eval()",
        "subprocess.run(['ls', folder])",
        "subprocess.run([*command, text], check=True)",
        "subprocess.run(['sh', '-c', 'ls \"$0\"', folder])",
        "YAML(typ='safe', pure=True)",
        "YAML()",
        "tarfile.open(path).extractall(folder, filter='data')",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_what_is_harmless_is_let_be(harmless):
    assert list(dangers(harmless)) == []


def test_no_command_of_the_graph_holds_a_parameter_for_a_shell_reads_it():
    graph = read_yaml(ROOT / "dvc.yaml")["stages"]
    named = {
        name: [found for found in re.findall(r"\$\{([\w.-]+)\}", body["cmd"]) if found != "key" and not found.startswith("item.")]
        for name, entry in graph.items()
        for body in [entry.get("do", entry)]
    }
    assert len(named) == 13 and {name: found for name, found in named.items() if found} == {}


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors"])
def test_a_pinned_file_leads_out_of_no_folder(name):
    file, table = {"bytes": 1, "sha256": "0" * 64}, name.replace(".safetensors", ".parquet")
    entry = {"commit": "0" * 40, "license": None, "gated": False}
    with pytest.raises(ValidationError, match="must lead into its repository"):
        SourcesLock.model_validate({"models": {"a/b": {**entry, "files": {name: file}}}})
    with pytest.raises(ValidationError, match="must lead into its repository"):
        SourcesLock.model_validate({"datasets": {"a/b": {**entry, "files": {"main/test": {table: file}}}}})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_qwen.py", "optimizer.pt", "weights.pkl", "adapter.ckpt"])
def test_no_pickle_and_no_code_is_taken_from_a_hub(name):
    model = {"commit": "0" * 40, "license": None, "gated": False, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    with pytest.raises(ValidationError, match="only .safetensors"):
        SourcesLock.model_validate({"models": {"a/b": model}})
