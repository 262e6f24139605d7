"""How a model lies in its repository."""

import json

import pytest

from stages.corpus.chat_format import alpaca, chatml, few_shot
from stages.corpus.marks import Marks
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json
from stages.host.layout import OURS, Asking, Chosen, choose, folders, gguf_name, parts

PARAMS = {"gguf_export": {"files": ["f16", "q8_0"]}}
SOURCE = {"repo": "Qwen/Qwen1.5-4B", "revision": 40 * "b"}
ASKING = Asking("own", alpaca(), "q8_0")


def test_what_is_published_where_nothing_is_chosen_is_everything_that_there_is():
    assert choose("orpo", PARAMS, False, False, ()) == Chosen(adapter=True, weights=True, gguf=("f16", "q8_0"))
    assert choose("base", PARAMS, False, False, ()) == Chosen(adapter=False, weights=True, gguf=("f16", "q8_0"))
    assert choose("orpo", PARAMS, False, False, ("q8_0", "q8_0")) == Chosen(adapter=False, weights=False, gguf=("q8_0",))


def test_a_base_has_no_adapter():
    with pytest.raises(InputError, match="base has no adapter"):
        choose("base", PARAMS, True, False, ())


@pytest.fixture
def tree(tmp_path):
    for folder in ("models/base", "models/merged/orpo", "models/orpo", "models/gguf/orpo"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(folder.encode())
    write_json(tmp_path / "models/base/source.json", SOURCE)
    write_json(tmp_path / "models/orpo/adapter_config.json", {"base_model_name_or_path": "models/base", "r": 16, "revision": None})
    (tmp_path / "models/gguf/orpo/q8_0.gguf").write_bytes(b"GGUF")
    return tmp_path


def laid_out(tree, base_source):
    return {part.name: part.content for part in parts(tree, "orpo", "team/it", Chosen(True, True, ("q8_0",)), base_source, ASKING)}


def test_an_adapter_names_a_published_base_and_its_commit_and_leaves_that_where_it_is(tree):
    found = laid_out(tree, SOURCE)
    assert json.loads(found["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": "Qwen/Qwen1.5-4B", "r": 16, "revision": SOURCE["revision"],
    }  # fmt: skip
    assert not any(name.startswith("base/") for name in found)


def test_a_base_that_was_made_here_goes_beside_its_adapter_under_a_name_that_is_no_repositorys(tree):
    found = laid_out(tree, None)
    assert found["base/model.safetensors"] == tree / "models/base/model.safetensors" and "base/source.json" not in found
    assert json.loads(found["adapter/adapter_config.json"])["base_model_name_or_path"] == "team/it/base"
    assert set(folders("orpo", Chosen(True, True, ("q8_0",)), True)) == {
        path.relative_to(tree) for path in tree.glob("models/*") if path.name not in ("merged", "gguf")
    } | {path.relative_to(tree) for path in tree.glob("models/*/orpo")}


def test_every_name_that_is_written_is_known_as_ours_and_no_other(tree):
    assert all(OURS.fullmatch(name) for name in [*laid_out(tree, None), "README.md", "tokenizer.json", "model-00001-of-00002.safetensors"])
    assert not any(map(OURS.fullmatch, ("LICENSE", "notes.txt", ".gitattributes", "docs/README.md", "images/model.safetensors.png")))


def test_gguf_names_carry_the_form_as_llama_cpp_looks_for_it():
    assert gguf_name("team/It-2", "q4_k_m") == "It-2-Q4_K_M.gguf"


def test_a_base_that_is_asked_by_example_stops_before_the_next_question():
    asking = Asking("few_shot", few_shot([("1+1?", "2")]), "q8_0")
    modelfile, template, params = (part.content.decode() for part in asking.parts("it.gguf"))
    assert template == "Question: 1+1?\nAnswer: 2\n\nQuestion: {{ .Prompt }}\nAnswer:"
    assert json.loads(params)["stop"][-1] == "\nQuestion:" and 'PARAMETER stop "\nQuestion:"\n' in modelfile
    assert asking.preferred(("f16",)) == "f16" and asking.preferred(("f16", "q8_0")) == "q8_0"


def test_another_bases_stop_tokens_are_named_and_what_begins_a_text_is_left_to_ollama():
    marks = Marks("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")
    asking = Asking("own", chatml("", marks), "q8_0", marks)
    modelfile, template, params = (part.content.decode() for part in asking.parts("it.gguf"))
    assert template == "<|im_start|>user\n{{ .Prompt }}<|eot_id|>\n<|im_start|>assistant\n"
    assert json.loads(params)["stop"] == ["<|eot_id|>", "<|end_of_text|>"] and "begin_of_text" not in modelfile
