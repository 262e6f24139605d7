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


def findings(small, source):
    """What the last run found in a source: how many rows of each kind, and how many of them it dropped."""
    entry = read_json(small / "spoilt-mix/account.json")[source]
    return {reason: (found["rows"], found["dropped"]) for reason, found in entry["findings"].items()}


def trained_ids(small, name="qlora"):
    return {
        row["id"] for part in ("train", "validation") for row in read_rows(small / f"spoilt-mix/{name}/{part}.jsonl")
    }


def test_a_gold_answer_of_the_test_that_is_no_number_is_named(small, raw):
    rewrite(
        raw / "test/rows.jsonl", lambda rows: [rows[0], {**rows[1], "answer": "Nobody knows.\n#### many"}, *rows[2:]]
    )
    assert_one_sentence(prepare(small), "the test source, row 2: the gold answer")


def test_a_damaged_row_of_the_test_is_named_for_none_may_be_left_out(small, raw):
    rewrite(raw / "test/rows.jsonl", lambda rows: [*rows[:3], {"question": rows[3]["question"]}, *rows[4:]])
    assert_one_sentence(prepare(small), "spoilt/test/rows.jsonl, row 4: no answer")


def test_a_training_answer_that_is_no_number_is_dropped_and_counted(small, raw):
    rewrite(raw / "rl/rows.jsonl", lambda rows: [{**rows[0], "solution": "x^2"}, *rows[1:]])
    assert prepare(small).returncode == 0
    assert findings(small, "rl, with a number as answer") == {"answer is no number": (1, 1)}


def test_a_test_question_in_training_is_dropped_counted_and_named_whatever_its_spaces(small, raw):
    asked = next(read_rows(raw / "test/rows.jsonl"))["question"]
    rewrite(
        raw / "reasoning/rows.jsonl", lambda rows: [{**rows[0], "problem": asked.upper().replace(" ", "  ")}, *rows[1:]]
    )
    assert prepare(small).returncode == 0
    found = read_json(small / "spoilt-mix/account.json")["reasoning"]["findings"]["asked in the test"]
    assert (found["rows"], found["dropped"], found["like"]) == (1, 1, {"reasoning-000000": "test-000000"})
    assert "reasoning-000000" not in trained_ids(small)


def test_thirteen_words_of_a_test_question_anywhere_in_a_row_count_and_twelve_do_not(small, raw):
    asked = max((row["question"] for row in read_rows(raw / "test/rows.jsonl")), key=len).split()
    assert len(asked) > 13

    def quoting(row, count):
        turns = row["conversations"]
        return {**row, "conversations": [turns[0], {"from": "gpt", "value": "As they say: " + " ".join(asked[:count])}]}

    checked = {"prepare_mix__clean__shares_words_with_the_test": True, "prepare_mix__clean__duplicate": False}
    chats = list(read_rows(raw / "chat/rows.jsonl"))
    write_rows(raw / "chat/rows.jsonl", [quoting(row, 12) for row in chats])
    assert prepare(small, **checked).returncode == 0
    assert "shares words with the test" not in findings(small, "chat")
    write_rows(raw / "chat/rows.jsonl", [quoting(row, 13) for row in chats])
    assert_one_sentence(prepare(small, **checked), "0 of its 100 can be used")


def test_duplicates_are_dropped_near_ones_only_where_their_numbers_agree(small, raw):
    def same_but_for(row, old, new, id):
        return {**row, "id": id, "problem": row["problem"].replace(old, new, 1)}

    long = "On a market day in early spring a farmer sells {} eggs and then {} more before he goes back home. How many in all?"

    def spoil(rows):
        row = {
            **rows[0],
            "problem": long.format(12, 30),
            "generated_solution": "12+30=42\n\\boxed{42}",
            "expected_answer": "42",
        }
        reworded = same_but_for(row, "in all?", "altogether?", "reworded")
        return [row, {**row, "id": "again"}, reworded, same_but_for(row, "12", "13", "renumbered"), *rows[1:]]

    rewrite(raw / "reasoning/rows.jsonl", spoil)
    assert prepare(small, prepare_mix__clean__near_duplicate=True, prepare_mix__clean__wrong_gold=False).returncode == 0
    found = read_json(small / "spoilt-mix/account.json")["reasoning"]["findings"]
    assert found["duplicate"]["like"] == {"again": "reasoning-000000"}
    assert found["near duplicate"]["like"]["reworded"] == "reasoning-000000"
    kept = trained_ids(small)
    assert {"reasoning-000000", "renumbered"} <= kept and not {"again", "reworded"} & kept


def test_a_switched_off_check_counts_and_drops_nothing(small, raw):
    rewrite(
        raw / "reasoning/rows.jsonl",
        lambda rows: [*rows[:5], *({**row, "id": f"{row['id']}-again"} for row in rows[:5]), *rows[5:]],
    )
    assert prepare(small, prepare_mix__clean__duplicate=False, prepare_mix__chat_share=0.1).returncode == 0
    assert findings(small, "reasoning")["duplicate"] == (5, 0)
    assert "reasoning-000000-again" in trained_ids(small)


def test_a_solution_that_ends_in_another_number_than_its_gold_is_dropped(small, raw):
    rewrite(raw / "reasoning/rows.jsonl", lambda rows: [{**rows[0], "expected_answer": "123456"}, *rows[1:]])
    assert prepare(small).returncode == 0
    assert findings(small, "reasoning")["wrong gold"] == (1, 1)
    assert "reasoning-000000" not in trained_ids(small)


def test_damaged_chats_are_dropped_by_reason(small, raw):
    turns = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello!"}]
    damaged = {
        "turns": [turns[::-1], turns[:1], [turns[0], turns[0], turns[1]], [turns[0], {"from": "gpt", "value": " "}]],
        "a turn is from nobody known": [[{"from": "narrator", "value": "Once"}, *turns]],
        "a turn is no text": [[turns[0], {"from": "gpt", "value": None}]],
        "a turn is no object": [["Hello.", "Hello!"]],
        "conversations is empty": [[]],
        "no conversations": [None],
    }
    rows = [{"conversations": value} for values in damaged.values() for value in values]
    rewrite(raw / "chat/rows.jsonl", lambda good: rows + good)
    assert_one_sentence(prepare(small, prepare_mix__chat_share=0.2348), "92 rows of the source chat are needed and 91")
    assert prepare(small, prepare_mix__chat_share=0.2328).returncode == 0
    entry = read_json(small / "spoilt-mix/account.json")["chat"]
    found = {reason: finding["dropped"] for reason, finding in entry["findings"].items()}
    assert found == {reason: len(values) for reason, values in damaged.items()}
    assert entry["read"] == entry["kept"] + sum(found.values())


def test_a_split_that_would_be_empty_is_named(small, raw):
    assert_one_sentence(prepare(small, prepare_mix__max_tokens=3), "data/mix/qlora/train.jsonl would be empty")


def test_a_source_that_is_left_out_is_named(small, raw):
    sources = read_json(raw / "sources.json")
    (raw / "sources.json").write_text(json.dumps({name: sources[name] for name in sources if name != "reasoning"}))
    assert_one_sentence(prepare(small), "fetch.sources.reasoning is none")


def test_too_few_chats_for_their_share_say_so(small, raw):
    assert_one_sentence(
        prepare(small, prepare_mix__chat_share=0.9), "2700 rows of the source chat are needed and 100 of its 100"
    )


def test_without_a_validation_source_a_share_is_held_out(small, raw):
    sources = read_json(raw / "sources.json")
    (raw / "sources.json").write_text(json.dumps({name: sources[name] for name in sources if name != "validation"}))
    assert prepare(small).returncode == 0
    account = read_json(small / "spoilt-mix/account.json")
    assert (account["qlora"]["train"], account["qlora"]["validation"]) == (320, 80)
    ids = {
        part: {row["id"] for row in read_rows(small / f"spoilt-mix/qlora/{part}.jsonl")}
        for part in ("train", "validation")
    }
    assert not ids["train"] & ids["validation"]


def test_money_decimals_commas_and_unicode_pass_through(small, raw):
    hard = {
        "question": "Zoë paid $1,234.50 — how much is ½ of it, in €?",
        "answer": "Half is <<1234.5/2=617.25>>617.25\n#### $617.25",
    }
    rewrite(raw / "test/rows.jsonl", lambda rows: [hard, *rows[1:]])
    assert prepare(small).returncode == 0
    row = next(read_rows(small / "spoilt-mix/test.jsonl"))
    assert (row["question"], row["answer"], row["steps"]) == (hard["question"], hard["answer"], 1)
