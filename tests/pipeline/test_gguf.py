"""GGUF: converter, quantiser and runtime of one llama.cpp, against transformers on the same weights."""

import hashlib
import json
import re

import pytest

from stages.corpus.chat_format import render
from stages.corpus.marks import STOP_TOKENS
from stages.harness.jsonl import read_rows
from tests.pipeline.conftest import Workplace


@pytest.fixture(scope="module")
def exported(small):
    small.do("gguf-export", model="merged", out="gguf")
    small.do("gguf-export", model="base", out="gguf-base")
    return small


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_bytes_do_not_depend_on_the_run_or_the_folder(exported):
    import shutil

    shutil.copytree(exported / "merged", exported / "elsewhere" / "named-otherwise")
    exported.do("gguf-export", model="elsewhere/named-otherwise", out="gguf-again")
    assert digests(exported / "gguf-again") == digests(exported / "gguf")


def test_only_the_forms_that_are_asked_for_are_kept(exported, tmp_path):
    fewer = Workplace(tmp_path, "embedded", {"gguf_export.files": ["q8_0"]})
    fewer.do("gguf-export", model=str(exported / "merged"), out="gguf")
    assert sorted(digests(tmp_path / "gguf")) == ["Modelfile", "README.md", "q8_0.gguf", "tensors.json"]
    assert digests(tmp_path / "gguf")["q8_0.gguf"] == digests(exported / "gguf")["q8_0.gguf"]


def test_llama_cpp_and_transformers_give_the_same_text(exported):
    from stages.inference.engine import Sampling
    from stages.inference.llama_cpp_engine import LlamaCppEngine
    from stages.inference.transformers_engine import TransformersEngine

    whole = TransformersEngine.from_folder(exported / "merged", batch_size=50)
    prompts = [render(whole.template, row["question"]) for row in read_rows(exported / "mix" / "test.jsonl")]
    wanted = whole.generate(prompts, Sampling(64))
    same = {}
    for form in ("f16", "q8_0"):
        engine = LlamaCppEngine(exported / "gguf" / f"{form}.gguf", sequences=16, context=256)
        assert engine.template == whole.template
        found = engine.generate(prompts, Sampling(64))
        engine.close()
        same[form] = sum(a.text == b.text for a, b in zip(wanted, found, strict=True))
        for a, b in zip(wanted, found, strict=True):
            if a.text == b.text:
                assert (a.finish_reason, a.tokens) == (b.finish_reason, b.tokens)
    assert same["f16"] >= 95 and same["q8_0"] >= 80, same


def test_a_text_does_not_depend_on_its_neighbours(exported):
    from stages.inference.engine import Sampling
    from stages.inference.llama_cpp_engine import LlamaCppEngine

    template = (exported / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    prompts = [render(template, row["question"]) for row in read_rows(exported / "mix" / "test.jsonl")][:20]
    texts = []
    for sequences in (1, 7):
        engine = LlamaCppEngine(exported / "gguf" / "q4_k_m.gguf", sequences=sequences, context=256)
        texts.append([completion.text for completion in engine.generate(prompts, Sampling(48))])
        engine.close()
    assert texts[0] == texts[1]


def test_token_ids_are_the_tokenizers_own_and_no_token_is_added(exported):
    from transformers import AutoTokenizer

    from stages.inference.llama_cpp_engine import LlamaCppEngine

    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    engine = LlamaCppEngine(exported / "gguf" / "f16.gguf", sequences=1, context=256)
    texts = [render(engine.template, row["question"]) for row in read_rows(exported / "mix" / "test.jsonl")]
    texts += ["naïve café, 1,234.50 €  — ½\n\n\tok?", "<|im_start|>user\nhi<|im_end|>\n", "", "日本語 ١٢٣"]
    for text in texts:
        assert engine._tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in STOP_TOKENS:
        assert engine.api.llama_vocab_is_eog(engine.vocab, tokenizer.convert_tokens_to_ids(token))
    engine.close()


def test_a_hundred_prompts_have_the_ids_that_transformers_gives_them_and_none_begins_twice(exported):
    """By the template in the file and llama.cpp's own vocabulary, as a chat server would make them."""
    import gguf
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    from transformers import AutoTokenizer, GenerationConfig

    file = exported / "gguf" / "q8_0.gguf"
    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    model = Llama(str(file), vocab_only=True, verbose=False)
    template = model.metadata["tokenizer.chat_template"]
    chat = Jinja2ChatFormatter(template, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token or "")
    rows = list(read_rows(exported / "mix" / "test.jsonl"))[:100]
    assert len(rows) == 100 and template == tokenizer.chat_template
    for row in rows:
        messages = [{"role": "user", "content": row["question"]}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        text = chat(messages=messages).prompt
        assert model.tokenize(text.encode(), add_bos=model.metadata["tokenizer.ggml.add_bos_token"] == "true", special=True) == wanted
        assert wanted.count(tokenizer.bos_token_id) == 0
    stops = set(GenerationConfig.from_pretrained(exported / "merged").eos_token_id)
    fields = gguf.GGUFReader(file).fields
    named = {fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot") if f"tokenizer.ggml.{name}_token_id" in fields}
    assert len(stops) == 2 and named <= stops


def read_modelfile(text: str) -> dict[str, list[str]]:
    """Of Ollama's grammar (docs.ollama.com/modelfile) what a Modelfile here may use; anything else fails."""
    line = re.compile(r'(FROM|TEMPLATE|PARAMETER (?:stop|temperature)) ("""(?:.|\n)*?"""|"[^"]*"|\S+)\n')
    found, place = {}, 0
    while place < len(text):
        said = line.match(text, place)
        assert said, text[place:]
        found.setdefault(said[1], []).append(said[2].strip('"'))
        place = said.end()
    return found


def test_ollama_is_told_to_ask_as_the_model_was_taught(exported):
    said = read_modelfile((exported / "gguf" / "Modelfile").read_text(encoding="utf-8"))
    template = (exported / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    (go,) = said["TEMPLATE"]
    assert go.replace("{{ .Prompt }}", "How many?") == render(template, "How many?")
    assert said["FROM"] == ["./q4_k_m.gguf"] and (exported / "gguf" / said["FROM"][0]).is_file()
    assert sorted(said["PARAMETER stop"]) == sorted(STOP_TOKENS) and said["PARAMETER temperature"] == ["0"]
    base = read_modelfile((exported / "gguf-base" / "Modelfile").read_text(encoding="utf-8"))
    assert base["TEMPLATE"] == ["{{ .Prompt }}"] and base["PARAMETER stop"]
    lines = (exported / "gguf" / "README.md").read_text(encoding="utf-8")
    assert all(f"llama-server -m {form}.gguf --jinja --temp 0" in lines for form in ("f16", "q8_0", "q4_k_m"))
    assert "--jinja" not in (exported / "gguf-base" / "README.md").read_text(encoding="utf-8")


def test_the_base_carries_no_template_and_both_forms_say_their_tensors(exported):
    from stages.inference.llama_cpp_engine import LlamaCppEngine

    engine = LlamaCppEngine(exported / "gguf-base" / "f16.gguf", sequences=1, context=64)
    assert engine.template is None
    engine.close()
    types = json.loads((exported / "gguf" / "tensors.json").read_text())
    assert set(types) == {"f16", "q8_0", "q4_k_m"}
    assert len({sum(counts.values()) for counts in types.values()}) == 1
    assert types["q8_0"]["Q8_0"] > 10


def test_a_prompt_that_does_not_fit_is_said_by_name(exported):
    from stages.harness.errors import InputError
    from stages.inference.engine import Sampling
    from stages.inference.llama_cpp_engine import LlamaCppEngine

    engine = LlamaCppEngine(exported / "gguf" / "f16.gguf", sequences=1, context=64)
    with pytest.raises(InputError, match="raise eval_gguf.context"):
        engine.generate(["word " * 60], Sampling(32))
    engine.close()


def test_a_file_that_is_no_gguf_is_said_by_name(tmp_path):
    from stages.harness.errors import InputError
    from stages.inference.llama_cpp_engine import LlamaCppEngine

    (tmp_path / "f16.gguf").write_bytes(b"GGUFjunk")
    with pytest.raises(InputError, match="f16.gguf is no GGUF file"):
        LlamaCppEngine(tmp_path / "f16.gguf", sequences=1, context=64)
