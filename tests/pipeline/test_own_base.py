"""docs/own-base.md: another family's model from a folder and a user's own tables, by changes to params.yaml alone.

The Llama-shaped base is the embedded one under other names (Qwen2 is Llama with biases), so that it can already add; the
Gemma-shaped one knows nothing.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.corpus import procedural
from stages.corpus.chat_format import render
from stages.corpus.procedural_families import Limits
from stages.harness.jsonl import read_json, read_rows
from tests.imports import ROOT
from tests.pipeline.conftest import CHANGES, Workplace, assert_one_sentence
from tests.pipeline.test_launcher import change, copy_of_the_tree, dvc

pytestmark = pytest.mark.xdist_group("own-base")  # they share a graph of two minutes
BASE = ROOT / "models/base"  # where the graph has been run
LLAMA = {
    "<|endoftext|>": "<|end_of_text|>",
    "<|im_start|>": "<|begin_of_text|>",
    "<|im_end|>": "<|eot_id|>",
    "<|pad|>": "<|reserved_special_token_0|>",
}
BEGIN, STOPS = "<|begin_of_text|>", ["<|eot_id|>", "<|end_of_text|>"]
METHODS = ("sft", "qlora", "grpo", "orpo")
SMALLER = {
    **{dotted: value for dotted, value in CHANGES.items() if not dotted.startswith(("base_model.", "fetch.documents", "fetch.careless"))},
    "fetch.sources.pretraining.rows": 10,
    "prepare_mix.max_tokens": 320,  # ChatML's turn starts are no tokens of this base
    "sft.max_length": 320,
    "qlora.max_length": 320,
    "grpo.max_prompt": 320,
    "orpo.max_length": 320,
    "preference_pairs.max_tokens": 320,
    "eval_gguf.context": 512,
    "eval_gguf.problems": 50,
    "eval_gguf.scored": "f16",
    "gguf_export.files": ["f16"],
    "eval_gguf.largest_drop": {"f16": None, "q8_0": None, "q4_k_m": None},
}


def adding_at_the_start(tokenizer: dict, token: str) -> None:
    """Has a tokenizer put a token before each text, in the form in which Llama's and Gemma's files say it."""
    id = next(added["id"] for added in tokenizer["added_tokens"] if added["content"] == token)
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def write_llama(base: Path, folder: Path) -> None:
    """A Qwen2 folder's model as a Llama with Llama 3's special tokens, and a chat template that is not ours."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    qwen = AutoModelForCausalLM.from_pretrained(base)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    config = LlamaConfig(**{name: getattr(qwen.config, name) for name in shared}, attention_bias=True, bos_token_id=1, eos_token_id=0)
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(qwen.state_dict(), strict=False)
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    llama.save_pretrained(folder)

    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    for ours, theirs in LLAMA.items():
        text = text.replace(ours, theirs)
    tokenizer = json.loads(text)
    adding_at_the_start(tokenizer, BEGIN)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": STOPS[1], "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def sha256_by_hand(folder: Path) -> str:
    """As docs/own-base.md has it typed."""
    typed = next(line for line in (ROOT / "docs/own-base.md").read_text(encoding="utf-8").splitlines() if "| sha256sum" in line)
    command = typed.partition("&& ")[2]
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout.split()[0]


def write_table(path: Path, split: str, count: int, **columns) -> str:
    """A user's CSV of problems; `columns` are functions by heading. Returns its sha256."""
    limits = Limits(largest=10, factor=5, result=30)
    problems = procedural.problems(split, count, 1, {1: 0.3, 2: 0.5, 3: 0.2}, limits)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Nr.", *columns])
        table.writerows([number, *(column(problem) for column in columns.values())] for number, problem in enumerate(problems, 1))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def llama(tmp_path_factory, request) -> Path:
    """data/local of a user: a Llama-shaped base, and tables with German headings."""
    folder = tmp_path_factory.mktemp("user") / "local"
    (folder / "llama").mkdir(parents=True)
    write_llama(BASE if BASE.is_dir() else request.getfixturevalue("small") / "base", folder / "llama")
    return folder


@pytest.fixture(scope="module")
def graph(llama, tmp_path_factory) -> Path:
    """A clone in which params.yaml alone was edited, after `dvc repro`."""
    folder = tmp_path_factory.mktemp("own") / "mathmind"
    copy_of_the_tree(folder)
    local = folder / "data/local"
    shutil.copytree(llama, local)
    source = {"kind": "local", "rows": None, "split": None, "repo": None, "config": None}
    question, answer = lambda problem: problem.question, lambda problem: problem.answer
    reasoning = write_table(
        local / "aufgaben.csv", "train", 300, Aufgabe=question, Lösung=lambda p: f"{p.working}\n\\boxed{{{p.answer}}}", Ergebnis=answer
    )
    test = write_table(local / "prüfung.csv", "test", 100, Frage=question, Antwort=lambda p: f"{p.marked_working}\n#### {p.answer}")
    change(
        folder,
        **SMALLER,
        **{
            "base_model.kind": "local",
            "base_model.folder": "llama",
            "base_model.sha256": sha256_by_hand(local / "llama"),
            "fetch.sources.reasoning": {
                **source, "schema": "openmathreasoning", "file": "aufgaben.csv", "sha256": reasoning,
                "columns": {"problem": "Aufgabe", "generated_solution": "Lösung", "expected_answer": "Ergebnis"},
            },
            "fetch.sources.test": {
                **source, "schema": "gsm8k", "file": "prüfung.csv", "sha256": test,
                "columns": {"question": "Frage", "answer": "Antwort"},
            },
        },
    )  # fmt: skip
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def prompts(graph: Path, model: str) -> list[str]:
    """What eval asks a model, a hundred times."""
    own = graph / f"models/merged/{model}/chat_template.jinja"
    template = own if own.is_file() else graph / "data/mix/prompts/few_shot.jinja"
    return [render(template.read_text(encoding="utf-8"), row["question"]) for row in read_rows(graph / "data/mix/test.jsonl")]


def test_the_whole_graph_runs_from_a_llama_in_a_folder_and_a_users_tables(graph):
    scores = read_json(graph / "metrics.json")["models"]
    enough = 0.1 if BASE.is_dir() else 0.0  # the tests' small base hardly adds
    assert {"base", *METHODS} <= scores.keys() and max(scores[name]["pass_at_1"] for name in METHODS) > enough, scores
    assert read_json(graph / "data/raw/sources.json")["test"]["rows"] == 100
    assert read_json(graph / "models/base/source.json")["folder"] == "llama"
    changed = subprocess.run(["git", "diff", "--name-only", "--", "stages", "params", "dvc.yaml"], cwd=graph, capture_output=True, text=True)
    assert changed.stdout == ""


@pytest.mark.parametrize("model", ["base", *METHODS])
def test_each_prompt_begins_once_and_reads_the_same_to_transformers_and_llama_cpp(graph, model):
    from transformers import AutoTokenizer

    from stages.inference.llama_cpp_library import vocabulary

    weights = graph / ("models/base" if model == "base" else f"models/merged/{model}")
    tokenizer = AutoTokenizer.from_pretrained(weights)
    with vocabulary(graph / f"models/gguf/{model}/f16.gguf") as (ids_of, ends):
        asked = prompts(graph, model)
        assert len(asked) == 100
        for prompt in asked:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ids[0] == tokenizer.convert_tokens_to_ids(BEGIN) and ids.count(ids[0]) == 1
            assert ids_of(prompt) == ids
        assert all(ends(tokenizer.convert_tokens_to_ids(token)) for token in STOPS)
    stops = read_json(weights / "generation_config.json")["eos_token_id"]
    assert sorted(tokenizer.convert_ids_to_tokens(stops)) == sorted(STOPS)
    assert tokenizer.pad_token == LLAMA["<|pad|>"]


def test_every_trained_row_begins_once_and_ends_with_its_stop_token(graph):
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from stages.training.models import Transformers, load_tokenizer
    from stages.training.trainer import dataset

    base, mix, pairs = graph / "models/base", graph / "data/mix", graph / "data/pairs"
    settings = {"output_dir": str(graph / "unused"), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 320}
    model, tokenizer = Transformers("fp32").load_base(base), load_tokenizer(base, mix / "sft/chat_template.jinja", ends_with=STOPS[0])
    begin, turn_end, text_end = tokenizer.convert_tokens_to_ids([BEGIN, *STOPS])
    rows = SFTTrainer(model=model, args=SFTConfig(**settings, assistant_only_loss=True), processing_class=tokenizer,
                      train_dataset=dataset(mix / "sft/train.jsonl", ("messages",))).train_dataset  # fmt: skip
    assert len(rows) > 50
    for row in rows:
        trained = [label for label in row["labels"] if label != -100]
        assert row["input_ids"].count(begin) == 1 and row["input_ids"][0] == begin and trained[-1] == turn_end
    tokenizer = load_tokenizer(base, pairs / "chat_template.jinja", ends_with=STOPS[1])
    rows = ORPOTrainer(model=model, args=ORPOConfig(**settings, remove_unused_columns=False), processing_class=tokenizer,
                       train_dataset=dataset(pairs / "train.jsonl", ("prompt", "chosen", "rejected"))).train_dataset  # fmt: skip
    for row in rows:
        for ids in (row["chosen_input_ids"], row["rejected_input_ids"]):
            assert ids.count(begin) == 1 and ids[0] == begin and ids[-1] == text_end and ids.count(text_end) == 1


@pytest.mark.parametrize("model", ["base", *METHODS])
def test_llama_cpp_says_mostly_what_transformers_says(graph, model):
    assert read_json(graph / f"results/metrics/{model}-gguf.json")["forms"]["f16"]["same_text"] >= 0.9


@pytest.fixture
def place(llama, tmp_path) -> Workplace:
    """A working folder whose base is a copy of the Llama-shaped one, free to be spoilt."""
    shutil.copytree(llama, tmp_path / "local")
    (tmp_path / "raw").mkdir()
    return Workplace(tmp_path)


def ask_for(place: Workplace, folder: str | None, sha256: str | None = None):
    place.set_params({"base_model.kind": "local", "base_model.folder": folder, "base_model.sha256": sha256})
    return place.run("base-model", raw="raw", sources_lock="params.yaml", out="base", out_curve="base.csv")


def test_the_hash_that_a_refusal_tells_is_the_one_to_write_down(place):
    refused = ask_for(place, "llama")
    assert_one_sentence(refused, "params.yaml's base_model.sha256 names none: get the right files, or write that there")
    told = re.search(r"has sha256 ([0-9a-f]{64})", refused.stdout)[1]
    assert told == sha256_by_hand(place / "local/llama")
    assert_one_sentence(ask_for(place, "llama", "0" * 64), f"wants {'0' * 64}")
    done = ask_for(place, "llama", told)
    assert done.returncode == 0, done.stdout
    assert (place / "base/model.safetensors").read_bytes() == (place / "local/llama/model.safetensors").read_bytes()


def test_a_folder_that_is_not_there_or_not_named_is_said_in_one_sentence(place):
    assert_one_sentence(ask_for(place, "lama"), "local/lama is missing: put the model's folder there")
    assert_one_sentence(ask_for(place, None), "params.yaml: base_model.folder: a local model needs it")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "holds its weights as pickles only (pytorch_model.bin)"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: edit(folder / "config.json", auto_map={}), "needs code of its own (auto_map in config.json)"),
        (lambda folder: edit(folder / "tokenizer_config.json", auto_map={}), "needs code of its own (auto_map in tokenizer_config.json)"),
        (lambda folder: edit(folder / "config.json", model_type="lama"), "is not a model that transformers reads"),
        (lambda folder: rename(folder, "<|reserved_special_token_0|>", "<|other|>"), "has no token to pad with and none of its 512 rows"),
    ],
)  # fmt: skip
def test_a_folder_is_refused_as_a_model_on_a_hub_is(place, spoil, sentence):
    folder = place / "local/llama"
    spoil(folder)
    first = ask_for(place, "llama")
    told = re.search(r"has sha256 ([0-9a-f]{64})", first.stdout)
    assert_one_sentence(ask_for(place, "llama", told[1]) if told else first, f"model llama {sentence}")
    assert not (place / "base").exists()


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**read_json(path), **values}))


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def test_a_tokenizer_whose_way_of_splitting_llama_cpp_does_not_know_is_refused_at_export(place):
    rename(place / "local/llama", r"|\\p{N}|", r"|\\p{N}{1,2}|")
    told = re.search(r"has sha256 ([0-9a-f]{64})", ask_for(place, "llama").stdout)[1]
    assert ask_for(place, "llama", told).returncode == 0
    assert_one_sentence(place.run("gguf-export", model="base", out="gguf"), "it does not know how the tokenizer splits text")


def write_gemma(folder: Path) -> None:
    """A tiny random Gemma with a SentencePiece tokenizer in both forms, as its makers publish them."""
    import io

    import sentencepiece
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    limits = Limits(largest=10, factor=5, result=30)
    texts = [f"{problem.question} {problem.working}" for problem in procedural.problems("train", 500, 1, {1: 0.5, 2: 0.5}, limits)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts), model_writer=model, model_type="bpe", vocab_size=600,
        byte_fallback=True, split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", control_symbols=["<start_of_turn>", "<end_of_turn>"], user_defined_symbols=["\n"],
        minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(id): id for id in range(pieces.vocab_size())}
    merges = generate_merges(vocab, {piece: pieces.get_score(id) for piece, id in vocab.items()})
    turns = ["<start_of_turn>", "<end_of_turn>"]
    GemmaTokenizer(vocab=vocab, merges=merges, additional_special_tokens=turns, mask_token=None, add_bos_token=True).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 256}  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=len(vocab), **size, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    Gemma3ForCausalLM(config).save_pretrained(folder)


def test_a_gemma_is_trained_merged_and_exported_and_keeps_its_own_tokenizer(tmp_path):
    pytest.importorskip("sentencepiece")
    write_gemma(tmp_path / "local/gemma")
    changes = {"prepare_mix.max_tokens": 512, "sft.max_length": 512, "sft.max_steps": 4, "sft.save_every": 4, "sft.per_device_batch": 4}
    place = Workplace(tmp_path, made_small={**CHANGES, **changes, "gguf_export.files": ["f16"], "fetch.sources.pretraining.rows": 10})
    place.do("fetch", sources_lock="params.yaml", out="raw")
    told = re.search(r"has sha256 ([0-9a-f]{64})", ask_for(place, "gemma").stdout)[1]
    assert ask_for(place, "gemma", told).returncode == 0
    place.do("prepare-mix", raw="raw", tokenizer="base", out="mix")
    assert (place / "mix/sft/chat_template.jinja").read_text().startswith("{{- '<bos>' -}}")
    place.do("sft", base="base", mix="mix", out="sft", out_curve="sft.csv")
    place.do("merge", base="base", adapter="sft", out="merged")
    place.do("gguf-export", model="merged", out="gguf")  # which holds llama.cpp's reading to the tokenizer's
    place.do("gguf-export", model="base", out="gguf-base")
    assert (place / "merged/tokenizer.model").read_bytes() == (place / "local/gemma/tokenizer.model").read_bytes()
    assert read_json(place / "merged/generation_config.json")["eos_token_id"] == [5, 1]

    (place / "absent").mkdir()
    (place / "absent/sentencepiece.py").write_text("raise ModuleNotFoundError(name='sentencepiece')")
    place.environment["PYTHONPATH"] = f"{place / 'absent'}:{place.environment['PYTHONPATH']}"
    refused = place.run("gguf-export", model="merged", out="gguf-again")
    assert_one_sentence(refused, "is read by the package sentencepiece, which is not installed: add it to the image of gguf-export")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="tests run one after another")
def test_what_shares_a_graph_is_worked_off_by_one_worker(request):
    """xdist tells its groups by a test's name, which pytest 9.2 does not let it change: the graph would be made twice."""
    assert request.node.nodeid.endswith("@own-base")
