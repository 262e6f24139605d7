"""prepare-mix on rows as they come: what is wrong is said by file and row, what is dropped is counted."""

import json
import shutil

import pytest

from stages.harness.jsonl import read_json, read_rows, write_rows
from tests.pipeline.conftest import assert_one_sentence


@pytest.fixture
def raw(small):
    """A copy of the small run's sources, free to be spoilt."""
    folder = small / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(small / "raw", folder)
    yield folder
    small.set_params({})


def prepare(small, **changes):
    small.set_params({name.replace("__", "."): value for name, value in changes.items()})
    shutil.rmtree(small / "spoilt-mix", ignore_errors=True)
    return small.run("prepare-mix", raw="spoilt", tokenizer="base", out="spoilt-mix")


def rewrite(path, change):
    rows = list(read_rows(path))
    write_rows(path, change(rows))


def test_a_gold_answer_of_the_test_that_is_no_number_is_named(small, raw):
    rewrite(raw / "test/rows.jsonl", lambda rows: [rows[0], {**rows[1], "answer": "Nobody knows.\n#### many"}, *rows[2:]])
    assert_one_sentence(prepare(small), "spoilt/test/rows.jsonl, row 2: the gold answer")


def test_a_training_answer_that_is_no_number_is_dropped_and_counted(small, raw):
    rewrite(raw / "rl/rows.jsonl", lambda rows: [{**rows[0], "solution": "x^2"}, *rows[1:]])
    assert prepare(small).returncode == 0
    counts = read_json(small / "spoilt-mix/account.json")["rl, with a number as answer"]
    assert counts["dropped: answer is no number"] == 1


def test_a_test_question_in_training_is_dropped_and_counted_whatever_its_spaces(small, raw):
    asked = next(read_rows(raw / "test/rows.jsonl"))["question"]
    rewrite(raw / "reasoning/rows.jsonl", lambda rows: [{**rows[0], "problem": asked.upper().replace(" ", "  ")}, *rows[1:]])
    assert prepare(small).returncode == 0
    assert read_json(small / "spoilt-mix/account.json")["reasoning"]["dropped: asked in the test"] == 1
    for row in read_rows(small / "spoilt-mix/qlora/train.jsonl"):
        assert row["messages"][0]["content"].lower().split() != asked.lower().split()


def test_a_split_that_would_be_empty_is_named(small, raw):
    assert_one_sentence(prepare(small, prepare_mix__max_tokens=3), "data/mix/qlora/train.jsonl would be empty")


def test_a_source_that_is_left_out_is_named(small, raw):
    sources = read_json(raw / "sources.json")
    (raw / "sources.json").write_text(json.dumps({name: sources[name] for name in sources if name != "reasoning"}))
    assert_one_sentence(prepare(small), "fetch.sources.reasoning is none")


def test_too_few_chats_for_their_share_say_so(small, raw):
    assert_one_sentence(prepare(small, prepare_mix__chat_share=0.9), "fetch more of it")


def test_without_a_validation_source_a_share_is_held_out(small, raw):
    sources = read_json(raw / "sources.json")
    (raw / "sources.json").write_text(json.dumps({name: sources[name] for name in sources if name != "validation"}))
    assert prepare(small).returncode == 0
    account = read_json(small / "spoilt-mix/account.json")
    assert (account["qlora"]["train"], account["qlora"]["validation"]) == (320, 80)
    ids = {part: {row["id"] for row in read_rows(small / f"spoilt-mix/qlora/{part}.jsonl")} for part in ("train", "validation")}
    assert not ids["train"] & ids["validation"]


def test_money_decimals_commas_and_unicode_pass_through(small, raw):
    hard = {"question": "Zoë paid $1,234.50 — how much is ½ of it, in €?", "answer": "Half is <<1234.5/2=617.25>>617.25\n#### $617.25"}
    rewrite(raw / "test/rows.jsonl", lambda rows: [hard, *rows[1:]])
    assert prepare(small).returncode == 0
    row = next(read_rows(small / "spoilt-mix/test.jsonl"))
    assert (row["question"], row["answer"], row["steps"]) == (hard["question"], hard["answer"], 1)


def test_counts_of_the_mix_are_the_reports():
    """25,669 rows of 19,252 and 6,417, split into 20,535 and 5,134."""
    from stages.corpus.mixing import held_out, with_share

    main, added = with_share(range(19_252), range(100_000), 0.25)
    assert (len(main), len(added)) == (19_252, 6_417)
    train, validation = held_out([*main, *added], 0.2)
    assert (len(train), len(validation)) == (20_535, 5_134)
