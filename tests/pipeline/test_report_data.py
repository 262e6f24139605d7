"""The report's data: tables of its schemas and sizes, damaged rows, rows of one's own, and GSM8K itself where it lies at hand."""

import csv
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.corpus import chat_format, mixing
from stages.corpus.cleaning import Checks, Cleaning
from stages.corpus.lengths import Lengths
from stages.corpus.marks import TURN_END
from stages.corpus.schemas import Unusable
from stages.corpus.sources import Sources
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.scoring.answers import extract_strict
from stages.training.own_tokenizer import train_tokenizer
from tests.imports import ROOT
from tests.pipeline.conftest import Workplace, assert_one_sentence
from tests.report_tables import local_sources, write_tables

GSM8K = ROOT / "data" / "local" / "gsm8k"
SETS = ("qlora", "sft", "grpo")
LIMIT = 260  # tokens; half of the small tables' rows are longer


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def tokenizer_for(rows: list[str], folder: Path) -> None:
    folder.mkdir()
    train_tokenizer(rows, 600).save(str(folder / "tokenizer.json"))


def fetched(folder: Path, rows: float, profile: str = "report-t4") -> Workplace:
    """A folder where fetch has brought local tables in place of a profile's hub sources, beside a small tokenizer."""
    place = Workplace(folder, profile, {})
    files = write_tables(folder / "local", rows=rows)
    sources = YAML(typ="safe").load((ROOT / "params" / f"{profile}.yaml").read_text(encoding="utf-8"))["fetch"][
        "sources"
    ]
    place.made_small = {"fetch.sources": local_sources(files, sources, sha256)}
    place.set_params({})
    place.do("fetch", sources_lock="params.yaml", out="raw")
    tokenizer_for(
        [problem.solution for problem in Sources(place / "raw").problems("reasoning")[:200]], folder / "tokenizer"
    )
    return place


def prepare(place: Workplace, out: str, workers: int = 2, **changes):
    place.set_params({f"prepare_mix.{name.replace('__', '.')}": value for name, value in changes.items()})
    place.environment["MATHMIND_WORKERS"] = str(workers)
    shutil.rmtree(place / out, ignore_errors=True)
    return place.run("prepare-mix", raw="raw", tokenizer="tokenizer", out=out)


def rows_of(folder: Path, name: str) -> list[dict]:
    return [row for part in ("train", "validation") for row in read_rows(folder / name / f"{part}.jsonl")]


@pytest.fixture(scope="module")
def tenth(tmp_path_factory) -> Workplace:
    """A tenth of the report's rows, some of them duplicates, too long or with questions of the test."""
    place = fetched(tmp_path_factory.mktemp("tenth"), 0.1)
    rows = [row for row in _parquet(place / "local/reasoning.parquet")]
    asked = _parquet(place / "local/test.parquet")[7]["question"]
    rows[600:600] = [
        rows[3],
        {**rows[4], "problem": asked},
        {**rows[5], "expected_answer": "1", "generated_solution": f"{asked} \\boxed{{1}}"},
    ]
    _write_parquet(place / "local/reasoning.parquet", rows)
    place.made_small["prepare_mix.system_prompt"] = "Show the working."  # the report's alone would fill the limit
    place.made_small["fetch.sources"]["reasoning"]["sha256"] = sha256(place / "local/reasoning.parquet")
    place.set_params({})
    shutil.rmtree(place / "raw")
    place.do("fetch", sources_lock="params.yaml", out="raw")
    return place


def _parquet(path: Path) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_report_s_tables_give_the_report_s_counts(tmp_path):
    place = fetched(tmp_path, 1.0)
    done = prepare(place, "mix")
    assert done.returncode == 0, done.stdout
    account = read_json(place / "mix/account.json")
    assert (account["reasoning"]["kept"], account["chat"]["kept"]) == (19_252, 6_417)
    assert account["qlora"]["kept"] == 25_669
    assert (account["qlora"]["train"], account["qlora"]["validation"]) == (20_535, 5_134)
    assert account["sft"]["train"] == 1_000
    assert account["grpo"]["kept"] == 1_000 + 14_116
    assert [len(rows_of(place / "mix", name)) for name in SETS] == [25_669, 1_250, 15_116]
    ids = [row["id"] for row in rows_of(place / "mix", "qlora")]
    assert len(set(ids)) == 25_669 and sum(id.startswith("chat-") for id in ids) == 6_417


def test_the_number_of_workers_changes_no_byte(tenth):
    made = {}
    for workers in (1, 2, 4):
        checks = {f"clean__{name}": True for name, value in Checks.model_fields.items() if value.annotation is bool}
        done = prepare(tenth, "mix", workers, too_long="cut", max_tokens=LIMIT, **checks)
        assert done.returncode == 0, done.stdout
        made[workers] = hashes(tenth / "mix")
    assert made[1] == made[2] == made[4]
    found = read_json(tenth / "mix/account.json")["reasoning"]["findings"]
    assert {"duplicate", "asked in the test", "shares words with the test"} <= set(found)


def test_a_cut_row_fits_still_stops_and_a_solution_without_its_answer_is_dropped(tenth):
    assert prepare(tenth, "mix", too_long="cut", max_tokens=LIMIT).returncode == 0
    account = read_json(tenth / "mix/account.json")["qlora"]
    found = {why: (finding["rows"], finding["dropped"]) for why, finding in account["findings"].items()}
    cut, lost = found["too long"][0], found["cut before its answer"][1]
    assert cut > 500 and lost > 500 and found["too long"][1] == 0
    tokenizer = Lengths(tenth / "tokenizer").tokenizer
    template = (tenth / "mix/qlora/chat_template.jinja").read_text(encoding="utf-8")
    whole = {row["id"]: row for row in _kept(tenth)}
    shorter = 0
    for row in rows_of(tenth / "mix", "qlora"):
        text = chat_format.render_messages(template, row["messages"])
        assert text.endswith(f"{TURN_END}\n")
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= LIMIT
        shorter += row["messages"] != whole[row["id"]]["messages"]
        if row["id"].startswith("reasoning-"):
            assert extract_strict(row["messages"][-1]["content"]) == extract_strict(
                whole[row["id"]]["messages"][-1]["content"]
            )
    assert shorter == cut - lost - found.get("no room for a reply", (0, 0))[1]


def _kept(place: Workplace) -> list[dict]:
    """What qlora reads where nothing is cut."""
    done = prepare(place, "whole", too_long="keep", max_tokens=LIMIT)
    assert done.returncode == 0, done.stdout
    return rows_of(place / "whole", "qlora")


def test_dropping_leaves_no_row_over_the_limit_and_counts_those_that_were(tenth):
    assert prepare(tenth, "mix", too_long="drop", max_tokens=LIMIT).returncode == 0
    dropped = read_json(tenth / "mix/account.json")["qlora"]["findings"]["too long"]
    assert dropped["rows"] == dropped["dropped"] == len(_kept(tenth)) - len(rows_of(tenth / "mix", "qlora")) > 500
    assert len(dropped["examples"]) == 3


def test_quick_counts_are_the_tokenizer_s_own(tmp_path):
    chance = random.Random(1)
    letters = ["a", "B", "é", "ß", "e\u0301", "漢字", "🙂", "\u200d", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", "3.5", "٣",
               "#", "$x^{2}$", "<|im_start|>", "<|im_end|>", "<|im", "\u00a0", "ﬁ", "\x00", "\ufeff", "½"]  # fmt: skip
    texts = ["".join(chance.choices(letters, k=chance.randint(0, 300))) for _ in range(2000)]
    tokenizer_for(texts, tmp_path / "tokenizer")
    lengths = Lengths(tmp_path / "tokenizer")
    assert lengths.quick
    for text in texts:
        exactly = lengths.tokenizer.encode(text, add_special_tokens=False).ids
        assert lengths.quick.encode(lengths._composed(text), allowed_special="all") == exactly
        assert lengths.over(text, len(exactly) - 1) and not lengths.over(text, len(exactly))


GOOD = {
    "gsm8k": {"question": "Anna has 3 pens and gets 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    "openmathreasoning": {"problem": "What is 3+4?", "generated_solution": "It is \\boxed{7}.", "expected_answer": "7"},
    "dapo": {"prompt": "What is 3+4?", "solution": "7"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello!"}]},
    "preferences": {"prompt": "What is 3+4?", "accepted": "7", "rejected": "8"},
    "documents": {"prompt": "What is 3+4?", "completion": "7"},
}
LONG = "long " * 200_000  # 1 MB


def damaged(chance: random.Random, row: dict, number: int) -> bytes:
    """The line of a row with something wrong, in its fields or in the JSON itself; now and then a good one."""
    row = json.loads(json.dumps(row))
    field = chance.choice(list(row))
    value = chance.choice([None, "", " ", 7, -1.5, True, float("nan"), float("inf"), [], {}, [None], ["x"], {"a": 1}, "\ud800", "a\udfff\n",
                           "\x00", "####", "#### ", "\\boxed{" * 50, "<SOLUTION>", "1e999999", "9" * 5000, "½/0", "@deep@", "@deeper@"])  # fmt: skip
    if number % 1000 == 0:
        value = LONG
    turns = [{"from": "human", "value": value}, {"from": value, "value": "x"}, {"role": "system", "content": {"from": "gpt"}}, value,
             {"from": ["gpt"], "value": "x"}, {"value": "x"}, {"from": "gpt", "value": [{"from": "gpt", "value": "deep"}]}]  # fmt: skip
    match chance.randrange(8):
        case 0:
            del row[field]
        case 1:
            row |= {"extra": value, "id": value, "steps": value, "family": value}
        case 2 | 3 | 4:
            row[field] = value
        case 5 if "conversations" in row:
            row["conversations"].insert(chance.randrange(3), chance.choice(turns))
    line = json.dumps(row).replace('"@deep@"', "[" * 9 + "]" * 9).replace('"@deeper@"', "[" * 90_000 + "]" * 90_000)
    match chance.randrange(9):
        case 0:
            line = chance.choice(
                [line[: chance.randrange(len(line))] or "{", "[" * 100_000, "null", "[]", '"', "\x00", line + line]
            )
        case 1:
            return line.encode().replace(b"a", b"\xff\xfe", 1)
    return line.encode()


@pytest.mark.parametrize("schema", GOOD)
def test_of_ten_thousand_damaged_rows_each_is_kept_or_counted_and_none_crashes(tmp_path, schema):
    chance, rows = random.Random(schema), 10_000
    lines = [damaged(chance, GOOD[schema], number) for number in range(rows)]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/rows.jsonl").write_bytes(b"\n".join(lines))
    entry = {"schema": schema, "columns": {}, "rows": rows, "files": [{"name": "rows.jsonl"}]}
    write_json(tmp_path / "sources.json", {"s": entry})
    account, sources = mixing.Account(), Sources(tmp_path)
    read = {"sharegpt": sources.conversations, "preferences": sources.preferences, "documents": sources.texts}.get(
        schema, sources.problems
    )
    if schema == "documents":  # pretraining reads these; nothing cleans them
        kept = [row for row in read("s") if not isinstance(row, Unusable)]
        left_out = rows - len(kept)
        assert all(row.reason for row in read("s") if isinstance(row, Unusable))
    else:
        kept = Cleaning(CHECKS, {"test-0": GOOD["gsm8k"]["question"]}, account, 2).keep("s", read("s"))
        found = account.as_json()["s"]
        left_out = sum(finding["dropped"] for finding in found["findings"].values())
        assert found["read"] == rows and found["kept"] == len(kept)
        assert "" not in found["findings"]
        write_json(tmp_path / "account.json", account.as_json())
    assert len(kept) + left_out == rows
    assert 300 < len(kept) < 9_000
    for row in kept:
        json.dumps(vars(row), ensure_ascii=False).encode()


CHECKS = Checks(turns=True, wrong_gold=True, asked_in_the_test=True, shares_words_with_the_test=True, duplicate=False,
                near_duplicate=False, words_shared=13, similarity=0.8)  # fmt: skip


def test_damaged_rows_go_through_the_stage_and_its_sets_hold_none(tmp_path):
    place = fetched(tmp_path, 0.05)
    chance = random.Random(0)
    good = {name: _parquet(place / f"local/{name}.parquet") for name in ("reasoning", "chat", "rl")}
    sources = place.made_small["fetch.sources"]
    for name, rows in good.items():
        lines = [
            damaged(chance, row, number + 1) if number % 2 else json.dumps(row).encode()
            for number, row in enumerate(rows)
        ]
        (place / f"local/{name}.jsonl").write_bytes(b"\n".join(lines))
        sources[name] |= {"file": f"{name}.jsonl", "sha256": sha256(place / f"local/{name}.jsonl")}
    place.set_params({})
    shutil.rmtree(place / "raw")
    place.do("fetch", sources_lock="params.yaml", out="raw")
    done = prepare(place, "mix", too_long="cut", max_tokens=600, sft_rows=None)
    assert done.returncode == 0, done.stdout
    account = read_json(place / "mix/account.json")
    for name, entry in account.items():
        if "read" in entry:
            assert entry["read"] == entry["kept"] + sum(finding["dropped"] for finding in entry["findings"].values()), (
                name
            )
    assert account["reasoning"]["rows"] == len(good["reasoning"]) and len(account["reasoning"]["findings"]) > 5
    for name in SETS:
        assert all(row["id"] and (row.get("messages") or row.get("prompt")) for row in rows_of(place / "mix", name))


OWN = [
    {
        "Aufgabe": f"Was ist {n}+1, „bitte“?",
        "Lösung": f"Es ist {n + 1},\nalso \\boxed{{{n + 1}}}.",
        "Ergebnis": str(n + 1),
    }
    for n in range(60)
]
COLUMNS = {"problem": "Aufgabe", "generated_solution": "Lösung", "expected_answer": "Ergebnis"}


def own_source(place: Workplace, kind: str, columns=COLUMNS) -> dict:
    (place / "local").mkdir(exist_ok=True)
    path = place / f"local/own.{kind}"
    match kind:
        case "csv":
            with path.open("w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
                table = csv.DictWriter(file, OWN[0])
                table.writeheader()
                table.writerows(OWN)
        case "jsonl":
            write_rows(path, OWN)
        case "parquet":
            _write_parquet(path, OWN)
    return {"fetch.sources.reasoning": {"kind": "local", "schema": "openmathreasoning", "rows": None, "split": None, "columns": columns,
                                        "file": path.name, "sha256": sha256(path), "repo": None, "config": None}}  # fmt: skip


def test_own_data_is_the_same_from_csv_jsonl_and_parquet(tmp_path):
    place, read = Workplace(tmp_path), {}
    for kind in ("csv", "jsonl", "parquet"):
        place.set_params(own_source(place, kind))
        place.do("fetch", sources_lock="params.yaml", out=kind)
        read[kind] = list(Sources(place / kind).problems("reasoning"))
    assert read["csv"] == read["jsonl"] == read["parquet"]
    assert [(row.question, row.solution, row.answer) for row in read["csv"]] == [tuple(row.values()) for row in OWN]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (None, "own.jsonl, row 1: no problem, which schema openmathreasoning needs, and its columns are 'Aufgabe', 'Lösung', 'Ergebnis'"),
        ({**COLUMNS, "problem": "Frage"}, "row 1: no problem"),
        ({**COLUMNS, "question": "Aufgabe"}, "fetch.sources.reasoning.columns: schema openmathreasoning has no field 'question'"),
    ],
)  # fmt: skip
def test_a_column_map_that_does_not_fit_is_named(tmp_path, columns, sentence):
    place = Workplace(tmp_path)
    place.set_params(own_source(place, "jsonl", columns))
    assert_one_sentence(
        place.run("fetch", sources_lock="params.yaml", out="raw"), sentence.replace("own.jsonl", "rows.jsonl")
    )


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's train.jsonl and test.jsonl do not lie in data/local/gsm8k")
def test_every_row_of_gsm8k_is_accounted_for_and_its_overlap_with_the_test_is_listed(tmp_path):
    place = Workplace(tmp_path, "gsm8k-local", {})
    (tmp_path / "local").symlink_to(GSM8K.parent)
    place.set_params({"fetch.sources.pretraining.kind": "none", "prepare_mix.max_tokens": 2000})
    place.do("fetch", sources_lock="params.yaml", out="raw")
    tokenizer_for(
        [problem.solution for problem in Sources(place / "raw").problems("reasoning")[:500]], tmp_path / "tokenizer"
    )
    done = place.run("prepare-mix", raw="raw", tokenizer="tokenizer", out="mix")
    assert done.returncode == 0, done.stdout
    account = read_json(place / "mix/account.json")
    assert account["test"]["rows"] == 1_319
    assert account["reasoning"]["read"] == account["reasoning"]["rows"] == 7_473
    found = account["reasoning"]["findings"]
    assert {why: finding["dropped"] for why, finding in found.items()} == {
        "shares words with the test": 4,
        "near duplicate": 1,
    }
    assert account["reasoning"]["kept"] == 7_468
    assert found["shares words with the test"]["like"]["reasoning-000020"] == "test-000632"
    answers = [row["answer"] for row in rows_of(place / "mix", "grpo")]
    assert not any("," in answer for answer in answers)
    golds = [row["answer"].rpartition("####")[2].strip() for row in read_rows(place / "mix/test.jsonl")]
    assert "," in "".join(golds)
