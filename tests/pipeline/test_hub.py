"""Data and models from a hub, by the real clients against a hub on loopback: whole, broken off, refused, and pinned."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.corpus.sources import Sources
from tests.hub_server import Hub, serving
from tests.imports import ROOT
from tests.pipeline.conftest import Workplace, assert_one_sentence
from tests.pipeline.test_launcher import FETCH, change, clone, environment, launch, scratch  # noqa: F401

TOKEN = "hf_" + "plantedInTheTest"  # in two, so that a copy of this file does not hold it
LOCK = Path("params/sources.lock.yaml")
GSM8K = "openai/gsm8k"


def gsm8k_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"What is {n} and {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(first, first + count)
    ]


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    file = BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), file, compression="none")
    return file.getvalue()


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CARD = b"""\
---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: test
    path: socratic/*
---
# Problems
"""
SHARDS = {f"main/train-0000{shard}-of-00003.parquet": parquet(gsm8k_rows(3000, 3000 * shard)) for shard in range(3)}
FILES = {
    "README.md": CARD,
    **SHARDS,
    "main/test-00000-of-00001.parquet": parquet(gsm8k_rows(50)),
    "socratic/test-00000-of-00001.parquet": parquet(gsm8k_rows(40, 9000)),
}
FIRST, SECOND, THIRD = SHARDS


class Place(Workplace):
    """A working folder with a profile that asks this hub, and a lock beside it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        super().__init__(folder)
        self.hub = hub
        (folder / "params").mkdir()
        (folder / LOCK).write_bytes((ROOT / LOCK).read_bytes())
        self.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}

    def ask(self, *, base: str | None = None, **sources: dict) -> None:
        """Makes the hub the source of what is named, and leaves the others of fetch out."""
        given = {f"fetch.sources.{name}": source(**sources.get(name, {"kind": "none"})) for name in SOURCES}
        model = {"base_model.kind": "hub", "base_model.repo": base} if base else {}
        self.set_params(given | model)

    def mathmind(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "stages", *arguments]
        environment = {name: self.environment[name] for name in ("PATH", "PYTHONPATH", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN")
                       if name in self.environment}  # fmt: skip
        return subprocess.run(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def pin(self, *arguments: str) -> str:
        done = self.mathmind("pin", *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def fetch(self) -> subprocess.CompletedProcess:
        return self.run("fetch", sources_lock=str(LOCK), out="raw")

    def base_model(self) -> subprocess.CompletedProcess:
        return self.run("base-model", raw="raw", sources_lock=str(LOCK), out="base", out_curve="base.csv")

    def lock(self) -> dict:
        return YAML(typ="safe").load((self / str(LOCK)).read_text(encoding="utf-8"))


SOURCES = ("pretraining", "reasoning", "chat", "rl", "preferences", "validation", "test")


def source(**given) -> dict:
    nothing = dict.fromkeys(("rows", "split", "columns", "file", "sha256", "repo", "config"))
    return {"kind": "hub", "schema": "gsm8k", **nothing, **given}


TRAIN = {"repo": GSM8K, "config": "main", "split": "train"}
TEST = {"repo": GSM8K, "config": "main", "split": "test"}


@pytest.fixture(scope="session")
def lock_of_train(tmp_path_factory) -> str:
    """What `mathmind pin rl` writes, asked for once."""
    folder = tmp_path_factory.mktemp("pinned")
    with serving(folder / "hub") as hub:
        hub.commit("dataset", GSM8K, FILES)
        place = Place(folder, hub)
        place.ask(rl=TRAIN)
        place.pin("rl")
        return (place / str(LOCK)).read_text()


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "hub") as hub:
        hub.commit("dataset", GSM8K, FILES)
        yield hub


@pytest.fixture
def place(tmp_path, hub):
    """A working folder whose one source is GSM8K's training rows, not pinned."""
    (tmp_path / "work").mkdir()
    place = Place(tmp_path / "work", hub)
    place.ask(rl=TRAIN)
    return place


@pytest.fixture
def pinned(place, lock_of_train):
    (place / str(LOCK)).write_text(lock_of_train)
    return place


def fetched(place: Workplace, name: str = "rl") -> dict[str, bytes]:
    """The files of a source by name, as they lie below raw/."""
    folder = place / f"raw/{name}"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(done: subprocess.CompletedProcess, sentence: str) -> None:
    assert_one_sentence(done, sentence)
    assert len(done.stdout.splitlines()) == 1, done.stdout


def test_the_pinned_files_come_whole_and_no_other(pinned):
    done = pinned.fetch()
    assert done.returncode == 0, done.stdout
    assert fetched(pinned) == SHARDS
    about = json.loads((pinned / "raw/sources.json").read_text())["rl"]
    commit = pinned.hub.repos["dataset", GSM8K].commits[0]
    assert (about["rows"], about["repo"], about["revision"]) == (9000, GSM8K, commit)
    assert (about["license"], about["gated"]) == ("mit", False)
    assert [file["sha256"] for file in about["files"]] == [
        hashlib.sha256(content).hexdigest() for content in SHARDS.values()
    ]
    assert f"{GSM8K} at {commit[:12]}: files 3, 0.7 MB" in done.stdout


def test_fetch_gives_the_same_bytes_again(pinned):
    pinned.fetch()
    before = {**fetched(pinned), "sources.json": (pinned / "raw/sources.json").read_bytes()}
    pinned.do("fetch", sources_lock=str(LOCK), out="again")
    again = {
        **{file: (pinned / f"again/rl/{file}").read_bytes() for file in SHARDS},
        "sources.json": (pinned / "again/sources.json").read_bytes(),
    }
    assert again == before


def test_of_more_rows_than_are_asked_for_the_first_are_used(pinned):
    pinned.ask(rl={**TRAIN, "rows": 4000})
    assert pinned.fetch().returncode == 0
    assert json.loads((pinned / "raw/sources.json").read_text())["rl"]["rows"] == 4000


def test_a_killed_download_asks_for_the_missing_bytes_alone(pinned):
    pinned.hub.plant(SECOND, stall_after=100_000)
    pinned.hub.plant(THIRD, stall_after=0)
    started = pinned.start("fetch", sources_lock=str(LOCK), out="raw")
    half, whole = (pinned / f"scratch/checkpoints/rl/{name}" for name in (f"{SECOND}.part", FIRST))
    for _ in range(200):
        time.sleep(0.05)
        if whole.exists() and half.exists() and half.stat().st_size > 90_000:
            break
    started.send_signal(signal.SIGKILL)
    started.communicate()
    have = half.stat().st_size
    pinned.hub.seen.clear()
    done = pinned.fetch()
    assert done.returncode == 0, done.stdout
    assert "of an earlier run" in done.stdout
    assert pinned.hub.asked(FIRST) == []
    assert [seen.headers["Range"] for seen in pinned.hub.asked(SECOND)] == [f"bytes={have}-"]
    assert [seen.headers["Range"] for seen in pinned.hub.asked(THIRD)] == [None]
    assert fetched(pinned) == SHARDS


def test_an_answer_that_breaks_off_is_continued(pinned):
    pinned.hub.plant(SECOND, cut_after=50_000)
    assert pinned.fetch().returncode == 0
    assert [seen.headers["Range"] for seen in pinned.hub.asked(SECOND)] == [None, "bytes=50000-"]
    assert fetched(pinned) == SHARDS


def test_a_server_without_ranges_begins_anew(pinned):
    pinned.hub.plant(SECOND, cut_after=50_000)
    pinned.hub.plant(SECOND, ignores_ranges=True)
    assert pinned.fetch().returncode == 0
    assert fetched(pinned) == SHARDS


def test_wrong_bytes_are_deleted_and_named(pinned):
    wrong = SHARDS[SECOND][:-1] + b"!"
    pinned.hub.plant(SECOND, body=wrong, times=2)
    assert_refused(
        pinned.fetch(), f"{GSM8K}: {SECOND} has sha256 {hashlib.sha256(wrong).hexdigest()}, {LOCK} wants sha256"
    )
    assert not list((pinned / "scratch/checkpoints").rglob(f"{Path(SECOND).name}*"))
    assert not (pinned / "raw").exists()
    pinned.hub.faults.clear()
    assert pinned.fetch().returncode == 0 and fetched(pinned) == SHARDS


@pytest.mark.parametrize("size", [-10, 10])
def test_a_file_of_another_size_is_deleted_and_named(pinned, size):
    body = SHARDS[SECOND][:size] if size < 0 else SHARDS[SECOND] + b"." * size
    pinned.hub.plant(SECOND, body=body, times=9)
    assert_refused(pinned.fetch(), f"{GSM8K}: {SECOND} has {len(body)} bytes")


def test_gated_data_comes_with_a_token_that_no_other_host_gets_to_see(pinned):
    repo = pinned.hub.repos["dataset", GSM8K]
    repo.gated, repo.token = "manual", TOKEN
    page = f"{pinned.hub.endpoint}/datasets/{GSM8K}"
    assert_refused(pinned.fetch(), f"dataset {GSM8K} is gated: accept its terms at {page}, then set HF_TOKEN")
    pinned.environment["HF_TOKEN"] = TOKEN
    done = pinned.fetch()
    assert done.returncode == 0, done.stdout
    assert {seen.headers["Authorization"] for seen in pinned.hub.asked(FIRST, "hub")} == {None, f"Bearer {TOKEN}"}
    assert {seen.headers["Authorization"] for seen in pinned.hub.seen if seen.server == "storage"} == {None}
    assert_nowhere(TOKEN, pinned, done.stdout)


def assert_nowhere(secret: str, place: Place, *texts: str) -> None:
    """No text and no file below the working folder holds it."""
    files = [path.read_bytes() for path in place.folder.rglob("*") if path.is_file()]
    assert files and not any(secret.encode() in content for content in [*files, *(text.encode() for text in texts)])


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            {"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}},
            "set HF_TOKEN to a valid token",
        ),
        ({"status": 403}, "(403): set HF_TOKEN to a valid token that may read it, or unset it"),
        ({"status": 410}, "answers 410 for"),
        ({"status": 503, "headers": {"Retry-After": "0"}, "times": 99}, "still answers 503 after 5 tries for"),
        ({"status": 429, "headers": {"Retry-After": "4000"}}, "asks to wait 4000 s for"),
        ({"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=3999'}}, "asks to wait 3999 s for"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_the_token(pinned, fault, sentence):
    pinned.environment["HF_TOKEN"] = TOKEN
    pinned.hub.plant(SECOND, **fault)
    done = pinned.fetch()
    assert_refused(done, sentence)
    assert_nowhere(TOKEN, pinned, done.stdout)
    assert "Signature" not in done.stdout


@pytest.mark.parametrize("token", ["hf_planted\x01InTheTest", "hf_plantedß"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(pinned, token):
    pinned.environment["HF_TOKEN"] = token
    done = pinned.fetch()
    assert_refused(done, "HF_TOKEN holds characters that no token has")
    assert "planted" not in done.stdout


@pytest.mark.parametrize(
    "fault", [{"status": 429, "headers": {"Retry-After": "2"}}, {"status": 503, "headers": {"Retry-After": "2"}}]
)
def test_a_hub_that_asks_to_wait_is_asked_again_after_that(pinned, fault):
    pinned.hub.plant(SECOND, **fault)
    start = time.monotonic()
    assert pinned.fetch().returncode == 0
    assert time.monotonic() - start > 2 and fetched(pinned) == SHARDS


def test_a_commit_or_file_that_the_hub_has_not_is_said_with_the_command(pinned):
    text = (pinned / str(LOCK)).read_text()
    commit = pinned.hub.repos["dataset", GSM8K].commits[0]
    (pinned / str(LOCK)).write_text(text.replace(commit, "f" * 40))
    again = "pin again with `mathmind pin rl --update`"
    assert_refused(pinned.fetch(), f"{pinned.hub.endpoint} has no commit {'f' * 40} of dataset {GSM8K}: {again}")
    (pinned / str(LOCK)).write_text(text.replace(SECOND, "main/elsewhere.parquet"))
    assert_refused(pinned.fetch(), f"has no file main/elsewhere.parquet in dataset {GSM8K} at {commit[:12]}: {again}")


def test_a_hub_out_of_reach_says_what_to_mend(pinned):
    pinned.environment["HF_ENDPOINT"] = "no.address"
    assert_refused(pinned.fetch(), "mend the network or set HF_ENDPOINT; what has come is kept")


def test_a_source_without_a_pin_names_the_command_before_anything_is_brought(pinned):
    pinned.ask(rl=TRAIN, test=TEST)
    assert_refused(pinned.fetch(), f"{LOCK} pins no commit of {GSM8K} main/test: run `mathmind pin test`")
    assert pinned.hub.seen == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("main/train-00001-of-00003.parquet", "../escape.parquet", "a file's name must lead into its repository"),
        ("main/train-00001-of-00003.parquet", "main/train.pkl", "only .jsonl, .parquet, .csv are taken"),
        ("gated: false", "gated: perhaps", "gated is 'perhaps'"),
        ("license: mit", "license: [", "line "),
    ],
)
def test_a_damaged_lock_is_one_sentence_with_its_key(pinned, old, new, sentence):
    text = (pinned / str(LOCK)).read_text()
    (pinned / str(LOCK)).write_text(text.replace(old, new))
    assert_refused(pinned.fetch(), sentence)


def test_pin_takes_the_files_that_the_datasets_library_would_read_in_its_order(place):
    place.ask(rl=TRAIN, test=TEST, validation={"repo": GSM8K, "config": "socratic", "split": "test"})
    commit = place.hub.repos["dataset", GSM8K].commits[0]
    said = place.pin("--all").splitlines()
    assert f"rl: {GSM8K} main/train is pinned at {commit[:12]}: files 3, 0.7 MB, licence mit" in said
    again = json.loads(place.pin("rl", "--json"))
    assert (again["name"], again["commit"], again["before"], again["files"]) == ("rl", commit, commit, 3) and not again["changed"]
    pinned = place.lock()["datasets"][GSM8K]
    assert {part: list(files) for part, files in pinned["files"].items()} == {
        "main/test": ["main/test-00000-of-00001.parquet"],
        "main/train": list(SHARDS),
        "socratic/test": ["socratic/test-00000-of-00001.parquet"],
    }
    assert place.fetch().returncode == 0
    assert questions(place, "rl") == questions_as_the_library_reads_them(place, GSM8K, "main", "train")


def questions(place: Place, name: str) -> list[str]:
    """What the stages read of a source, in their order."""
    return [problem.question for problem in Sources(place / "raw").problems(name)]


def questions_as_the_library_reads_them(place: Place, repo: str, config: str, split: str) -> list[str]:
    code = ("import json, sys, datasets; repo, config, split = sys.argv[1:]; datasets.disable_progress_bars();"
            "print(json.dumps(datasets.load_dataset(repo, config, split=split)['question'][:]))")  # fmt: skip
    environment = {name: place.environment[name] for name in ("PATH", "HF_ENDPOINT", "HF_HOME")}
    command = [sys.executable, "-c", code, repo, config, split]
    return json.loads(
        subprocess.run(command, env=environment, cwd=place.folder, capture_output=True, text=True, check=True).stdout
    )


def test_a_plain_file_without_a_card_is_the_default_configuration(place):
    content = json_lines(gsm8k_rows(12))
    place.hub.commit("dataset", "me/plain", {"train.jsonl": content})
    place.ask(rl={"repo": "me/plain", "split": "train"})
    assert "no licence named" in place.pin("rl")
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    files = {"default/train": {"train.jsonl": {"bytes": len(content), "git_sha1": git}}}
    assert place.lock()["datasets"]["me/plain"]["files"] == files
    assert place.fetch().returncode == 0
    assert fetched(place) == {"train.jsonl": content}
    assert questions(place, "rl") == questions_as_the_library_reads_them(place, "me/plain", "default", "train")


def test_a_pin_stays_until_it_is_told_to_move_and_then_moves_whole(place, lock_of_train):
    (place / str(LOCK)).write_text("# My own words.\n" + lock_of_train)
    old = place.hub.repos["dataset", GSM8K].commits[0]
    new = place.hub.commit("dataset", GSM8K, {**FILES, SECOND: parquet(gsm8k_rows(10))}, gated="auto", token=TOKEN)
    place.environment["HF_TOKEN"] = TOKEN
    assert place.pin("rl") == f"rl: {GSM8K} main/train stays at {old[:12]}\n"
    place.ask(rl=TRAIN, test=TEST)
    assert f"main/test is pinned at {old[:12]}" in place.pin("test")
    said = place.pin("test", "--update")
    assert (
        f"test: {GSM8K} main/test moves from {old[:12]} to {new[:12]}: files 1" in said
        and "licence mit, gated (auto)" in said
    )
    pinned = place.lock()["datasets"][GSM8K]
    assert (pinned["commit"], pinned["gated"]) == (new, "auto") and list(pinned["files"]) == ["main/test", "main/train"]
    assert pinned["files"]["main/train"][SECOND]["bytes"] == len(parquet(gsm8k_rows(10)))
    assert (place / str(LOCK)).read_text().startswith("# My own words.\n")


@pytest.mark.parametrize(
    ("given", "files", "sentence"),
    [
        ({"config": None}, FILES, "Please pick one among the available configs: ['main', 'socratic']"),
        ({"split": "tset"}, FILES, "has no split tset: it has train, test"),
        ({"config": None}, {"gsm8k.py": b"import os"}, "is read by a script (gsm8k.py)"),
        (
            {"config": None},
            {"train.txt": b"text"},
            "keeps default/train in train.txt: only .jsonl, .parquet, .csv files",
        ),
        ({"config": None}, {"README.md": b"nothing else"}, "default/train"),
        ({"repo": "openai/gsm9k"}, FILES, "shows no dataset openai/gsm9k"),
        ({"repo": "no name"}, FILES, "dataset no name is no name of a repository: write owner/name"),
        ({"repo": None}, FILES, "params.yaml: fetch.sources.rl: a hub source needs repo and split"),
    ],
)
def test_what_cannot_be_pinned_is_one_sentence_and_the_lock_stays(tmp_path, given, files, sentence):
    with serving(tmp_path / "hub") as hub:
        hub.commit("dataset", GSM8K, files)
        (tmp_path / "work").mkdir()
        place = Place(tmp_path / "work", hub)
        place.ask(rl={**TRAIN, **given})
        done = place.mathmind("pin", "rl")
        assert_refused_by_click(done, sentence)
        assert (place / str(LOCK)).read_bytes() == (ROOT / LOCK).read_bytes()


def assert_refused_by_click(done: subprocess.CompletedProcess, sentence: str) -> None:
    assert_one_sentence(done, sentence)
    assert [line for line in done.stdout.splitlines() if line.startswith("Error: ")], done.stdout


def test_pin_wants_one_name_that_is_a_hub_source_or_all(place):
    for arguments in ((), ("rl", "--all")):
        assert_refused_by_click(place.mathmind("pin", *arguments), "name one source, or give --all")
    assert_refused_by_click(
        place.mathmind("pin", "test"), "params.yaml names no hub source test: its hub sources are rl"
    )


def test_pin_all_pins_the_sources_of_every_profile(place):
    (place / "params/other.yaml").write_bytes((place / "params.yaml").read_bytes())
    place.ask(test=TEST)
    assert [line.split()[2] for line in place.pin("--all").splitlines()] == ["main/test", "main/train"]


def test_pin_waits_where_the_hub_asks_for_it_and_hides_the_token(place):
    place.environment["HF_TOKEN"] = TOKEN
    repo = place.hub.repos["dataset", GSM8K]
    repo.gated, repo.token = "auto", "another"
    place.hub.plant("/revision/main", status=503, headers={"Retry-After": "1"})
    done = place.mathmind("pin", "rl")
    assert_refused_by_click(done, f"dataset {GSM8K} is gated: accept its terms at")
    repo.token = TOKEN
    assert "gated (auto)" in place.pin("rl")
    assert_nowhere(TOKEN, place, done.stdout)


QWEN = "Qwen/Qwen1.5-tiny"
QWEN_CARD = (
    b"---\nlicense: other\nlicense_name: tongyi-qianwen-research\nlicense_link: https://example.org/LICENSE\n---\n"
)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> dict[str, bytes]:
    """A Qwen2 with random weights as Qwen publishes its models: in shards, padding with its stop token, with rows to spare."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    from stages.training.own_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    texts = [f"{row['question']}\n{row['answer']}" for row in gsm8k_rows(200)]
    bpe = json.loads(train_tokenizer(texts, 400).to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    vocab = [token for token in bpe["vocab"] if not token.startswith("<|")]
    tokenizer = Qwen2Tokenizer(
        {token: id for id, token in enumerate(vocab)},
        merges,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="{{ messages }}",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    eos = tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 10, **size, bos_token_id=eos, eos_token_id=eos, max_position_embeddings=512
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return {"README.md": QWEN_CARD, **{path.name: path.read_bytes() for path in folder.iterdir()}}


@pytest.fixture
def place_of_qwen(tmp_path, hub, qwen):
    """A working folder whose base model is on the hub, not pinned."""
    hub.commit("model", QWEN, qwen)
    (tmp_path / "work/raw").mkdir(parents=True)
    place = Place(tmp_path / "work", hub)
    place.ask(base=QWEN, rl=TRAIN)
    return place


def test_a_published_model_becomes_the_base_with_its_weights_untouched(place_of_qwen, qwen):
    place = place_of_qwen
    assert_refused(place.base_model(), f"{LOCK} pins no commit of {QWEN}: run `mathmind pin base-model`")
    assert "licence other (tongyi-qianwen-research, https://example.org/LICENSE)" in place.pin("base-model")
    done = place.base_model()
    assert done.returncode == 0, done.stdout
    for name, content in qwen.items():
        if name.startswith("model-") or name in ("config.json", "model.safetensors.index.json"):
            assert (place / f"base/{name}").read_bytes() == content
    about = json.loads((place / "base/source.json").read_text())
    assert (about["repo"], about["license"], about["license_name"]) == (QWEN, "other", "tongyi-qianwen-research")
    assert (place / "base.csv").read_text() == "step\n"
    check_that_it_generates(place / "base")


def check_that_it_generates(base: Path) -> None:
    """Loads a base as the stages do: both stop tokens end an answer, and padding is none of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<|pad|>", None)
    assert tokenizer.pad_token_id not in stops and tokenizer.pad_token_id < model.config.vocab_size
    batch = tokenizer(["What is 3 and 3?", "What is 4?"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2


def changed(qwen: dict[str, bytes], name: str, old: bytes, new: bytes) -> dict[str, bytes]:
    assert old in qwen[name]
    return {**qwen, name: qwen[name].replace(old, new)}


def test_pin_refuses_pickles_and_code(place_of_qwen, qwen):
    place, hub = place_of_qwen, place_of_qwen.hub
    others = {name: content for name, content in qwen.items() if not name.startswith("model")}
    hub.commit("model", QWEN, {**others, "pytorch_model.bin": b"pickled", "onnx/model.safetensors": b"elsewhere"})
    assert_refused_by_click(
        place.mathmind("pin", "base-model"), "holds its weights as pickles only (pytorch_model.bin)"
    )
    hub.commit(
        "model",
        QWEN,
        changed(qwen, "config.json", b'"vocab_size"', b'"auto_map": {"AutoModel": "own.Model"}, "vocab_size"'),
    )
    assert_refused_by_click(place.mathmind("pin", "base-model"), "needs code of its own (auto_map in config.json)")
    assert (place / str(LOCK)).read_bytes() == (ROOT / LOCK).read_bytes()


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("config.json", b'"vocab_size"', b'"auto_map": {}, "vocab_size"', "needs code of its own (auto_map in config.json)"),
        ("config.json", b'"model_type": "qwen2"', b'"model_type": "qwen9"', "is not a model that transformers reads"),
        ("config.json", b'"vocab_size": 283', b'"vocab_size": 273', "no token to pad with and none of its 273 rows to spare"),
        ("config.json", b'"vocab_size": 283', b'"vocab_size": 270', "no weights for <|im_end|>, with which answers would end"),
    ],
)  # fmt: skip
def test_base_model_refuses_what_no_method_could_use(place_of_qwen, qwen, name, old, new, sentence):
    place = place_of_qwen
    files = changed(qwen, name, old, new)
    lock_by_hand(place, place.hub.commit("model", QWEN, files), files)
    assert_one_sentence(place.base_model(), sentence)
    assert not (place / "base").exists()


def lock_by_hand(place: Place, commit: str, files: dict[str, bytes]) -> None:
    """A lock as somebody may write it who does not ask `mathmind pin`, which would refuse."""

    def git(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def pinned(name: str, content: bytes) -> dict:
        large = name.endswith(".safetensors")
        return {
            "bytes": len(content),
            **({"sha256": hashlib.sha256(content).hexdigest()} if large else {"git_sha1": git(content)}),
        }

    taken = {name: pinned(name, files[name]) for name in sorted(files) if name.endswith((".json", ".safetensors"))}
    with (place / str(LOCK)).open("w") as file:
        YAML().dump({"models": {QWEN: {"commit": commit, "license": None, "gated": False, "files": taken}}}, file)


def test_the_launcher_opens_the_hub_to_fetch_and_finds_a_killed_runs_files(clone, hub, lock_of_train):
    """docker/run with its native engine: endpoint, token and online mode come through, and nothing of the token stays."""
    change(clone, **{f"fetch__sources__{name}": source(kind="none") for name in SOURCES})
    change(clone, fetch__sources__rl=source(**TRAIN))
    (clone / LOCK).write_text(lock_of_train)
    repo = hub.repos["dataset", GSM8K]
    repo.gated, repo.token = "auto", TOKEN
    asking = environment(HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    hub.plant(SECOND, stall_after=0)
    started = subprocess.Popen(
        FETCH, cwd=clone, env=asking, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for _ in range(200):
        time.sleep(0.05)
        if {path.name for path in scratch(clone)} >= {Path(FIRST).name, Path(THIRD).name}:
            break
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate()
    hub.seen.clear()
    done = launch(clone, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0, said + done.stdout + done.stderr
    assert hub.asked(FIRST) == hub.asked(THIRD) == []
    assert {name: (clone / f"data/raw/rl/{name}").read_bytes() for name in SHARDS} == SHARDS
    assert scratch(clone) == []
    texts = [
        said,
        done.stdout,
        done.stderr,
        *(path.read_bytes().decode("latin-1") for path in clone.rglob("*") if path.is_file()),
    ]
    assert not any(TOKEN in text for text in texts)
