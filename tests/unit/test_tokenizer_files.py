"""A base's marks, read from tokenizer files of each family's form."""

import json

import pytest

from stages.corpus.chat_format import alpaca, chatml, few_shot, render, render_messages
from stages.corpus.marks import Marks
from stages.corpus.tokenizer_files import LLAMA3_PATTERN, QWEN2_PATTERN, keep_sentencepiece, marks_of, pre_tokenizer_name
from stages.harness.errors import InputError

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def tokenizer(folder, added, config, begin=None, pattern=None):
    """Writes tokenizer.json and tokenizer_config.json as far as anything here reads them."""
    template = [{"SpecialToken": {"id": begin, "type_id": 0}}] * bool(begin) + [{"Sequence": {"id": "A", "type_id": 0}}]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    about = {
        "added_tokens": [{"id": id, "content": token} for id, token in enumerate(added)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]} if pattern else None,
        "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": template}]},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(about))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


FAMILIES = {
    "qwen": (
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}),
        Marks(),
    ),
    "llama 3": (
        (
            ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
            {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"},
            "<|begin_of_text|>",
        ),
        Marks("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"),
    ),
    "llama 2": (
        (["<unk>", "<s>", "</s>"], {"eos_token": {"content": "</s>"}, "bos_token": {"content": "<s>"}, "add_bos_token": True}),
        Marks("</s>", "</s>", "<s>"),
    ),
    "gemma": (
        (["<pad>", "<eos>", "<bos>", "<end_of_turn>"], {"eos_token": "<eos>", "bos_token": "<bos>"}, "<bos>"),
        Marks("<end_of_turn>", "<eos>", "<bos>"),
    ),
    "a bos token that begins nothing": (
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}),
        Marks(),
    ),
    "switched off in its configuration": (
        (["<s>", "</s>"], {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": False}, "<s>"),
        Marks("</s>", "</s>", ""),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_marks_are_the_familys_own(tmp_path, family):
    written, marks = FAMILIES[family]
    assert marks_of(tokenizer(tmp_path, *written)) == marks


def test_a_base_with_one_stop_token_has_it_once():
    assert Marks("</s>", "</s>").stops == ("</s>",) and Marks().stops == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [({}, "names nothing as eos_token"), ({"eos_token": "</s>"}, "names </s>, which is no special token, as eos_token")],
)
def test_a_base_that_cannot_end_an_answer_is_refused(tmp_path, config, sentence):
    with pytest.raises(InputError, match=f"my model: its tokenizer {sentence}"):
        marks_of(tokenizer(tmp_path, ["<s>"], config), "my model")


def test_a_folder_without_tokenizer_json_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer.json"):
        marks_of(tmp_path)


def test_templates_begin_with_what_begins_a_text_once_and_end_answers_with_the_bases_own_tokens():
    llama = Marks("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")
    assert render_messages(chatml("Be brief.", llama), CHAT) == (
        "<|begin_of_text|><|im_start|>system\nBe brief.<|eot_id|>\n<|im_start|>user\n1+1?<|eot_id|>\n<|im_start|>assistant\n2<|eot_id|>\n"
    )
    assert render_messages(alpaca(llama), CHAT).endswith("### Response:\n2<|end_of_text|>")
    for template in (chatml("", llama), alpaca(llama), few_shot([("1?", "1")], llama)):
        text = render(template, "1+1?")
        assert text.startswith("<|begin_of_text|>") and text.count("<|begin_of_text|>") == 1
        assert text.removeprefix("<|begin_of_text|>")[0] not in "\n "


def test_qwens_marks_leave_the_templates_as_they_stand():
    assert render_messages(chatml(), CHAT) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert "<|endoftext|>" in alpaca() and alpaca() == alpaca(Marks())


@pytest.mark.parametrize(
    ("pattern", "name"), [(QWEN2_PATTERN, "qwen2"), (LLAMA3_PATTERN, "llama-bpe"), (r"\p{L}+", None), (None, None)]
)
def test_a_pre_tokenizer_that_is_known_has_llama_cpps_name(tmp_path, pattern, name):
    assert pre_tokenizer_name(tokenizer(tmp_path, [], {}, pattern=pattern)) == name


def test_a_sentencepiece_file_is_carried_on_where_there_is_one(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    keep_sentencepiece(base, out)
    assert not list(out.iterdir())
    (base / "tokenizer.model").write_bytes(b"pieces")
    keep_sentencepiece(base, out)
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
