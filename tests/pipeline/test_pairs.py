"""preference-pairs from others' pairs, the base's own mistakes and a teacher, who is llama-cpp-python's server with the small base."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import pytest

from stages.corpus.sources import Sources
from stages.corpus.teacher import Teacher, key_of, request_of
from stages.harness.jsonl import read_json, read_rows, write_json, write_rows
from stages.host.teach import needed_requests
from stages.inference.transformers_engine import TransformersEngine
from stages.preference_pairs import Sample, most_plausible
from stages.scoring.answers import equal, extract_strict, parse_number
from tests.imports import ROOT
from tests.pipeline.conftest import Workplace, assert_one_sentence
from tests.pipeline.reader import typed, walk

KEY = "sk-planted-4f1d9c"
TEACHER = {
    "model": "base",
    "system_prompt": "Answer with a number.",
    "temperature": 0.0,
    "max_tokens": 24,
    "seed": None,
}
QUESTIONS = 40


def pairs(place, **changes):
    place.set_params({f"preference_pairs.{name.replace('__', '.')}": value for name, value in changes.items()})
    shutil.rmtree(place / "out-pairs", ignore_errors=True)
    (place / "teacher").mkdir(exist_ok=True)
    return place.run("preference-pairs", raw="raw", base="base", mix="mix", teacher="teacher", out="out-pairs")


def rows(place):
    return [row for part in ("train", "validation") for row in read_rows(place / f"out-pairs/{part}.jsonl")]


@pytest.fixture(autouse=True)
def as_before(small):
    yield
    small.set_params({})
    shutil.rmtree(small / "teacher", ignore_errors=True)
    (small / "teacher").mkdir()


def test_two_runs_make_the_same_bytes(small):
    made = []
    for _ in range(2):
        done = pairs(small, keep="most_plausible")
        assert done.returncode == 0, done.stdout
        made.append({path.name: path.read_bytes() for path in (small / "out-pairs").iterdir()})
    assert made[0] == made[1]


def test_a_pair_is_a_right_answer_and_a_wrong_one_in_the_same_form_to_one_problem(small):
    assert pairs(small).returncode == 0
    problems = {problem.id: problem for problem in Sources(small / "raw").problems("reasoning")}
    assert len(rows(small)) >= 5
    for row in rows(small):
        gold = parse_number(problems[row["id"]].answer)
        assert problems[row["id"]].question in row["prompt"]
        assert equal(extract_strict(row["chosen"]), gold)
        assert parse_number(extract_strict(row["rejected"])) is not None and not equal(
            extract_strict(row["rejected"]), gold
        )


def test_the_most_plausible_mistake_is_the_one_whose_tokens_the_base_finds_likeliest(small):
    import torch

    engine = TransformersEngine.from_folder(small / "base", 8)
    problem = Sources(small / "raw").problems("reasoning")[0]
    texts = ["It is 5.\n#### 5", "5", "The answer: 12\n#### 12"]
    samples = [Sample(problem, f"Question: {problem.question}\nAnswer:", text) for text in texts]

    def mean_log_probability(sample):
        prompt, answer = (
            engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample.prompt, f" {sample.text}")
        )
        with torch.inference_mode():
            logits = engine.model(torch.tensor([prompt + answer])).logits[0]
        each = torch.log_softmax(logits.double(), -1)
        return sum(each[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)) / len(answer)

    expected = [mean_log_probability(sample) for sample in samples]
    found = engine.mean_log_probabilities([(sample.prompt, f" {sample.text}") for sample in samples])
    assert found == pytest.approx(expected, abs=1e-4)
    assert most_plausible(engine, samples) == [samples[expected.index(max(expected))]]


def test_keeping_the_most_plausible_changes_which_mistake_and_not_which_problem(small):
    made = {}
    for keep in ("first", "most_plausible"):
        assert pairs(small, keep=keep, samples=8).returncode == 0
        made[keep] = {row["id"]: row["rejected"] for row in rows(small)}
    assert made["first"].keys() == made["most_plausible"].keys() and made["first"] != made["most_plausible"]


def test_pairs_of_others_are_cleaned_counted_and_measured(small):
    asked = next(iter(Sources(small / "raw").test_questions().values()))
    good = [
        {"prompt": f"What is {n}+1?", "accepted": f"It is\n#### {n + 1}", "rejected": "It is certainly\n#### 0"}
        for n in range(50)
    ]
    bad = [{**good[0], "prompt": asked}, good[1], {**good[2], "prompt": "Alike?", "rejected": good[2]["accepted"]},
           {**good[3], "prompt": "Long?", "accepted": "so " * 900}, {**good[4], "accepted": None}]  # fmt: skip
    folder = small / "raw-of-others"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(small / "raw", folder)
    write_rows(folder / "preferences/rows.jsonl", [*good, *bad])
    entry = {
        "kind": "local",
        "schema": "preferences",
        "columns": {},
        "rows": len(good) + len(bad),
        "files": [{"name": "rows.jsonl"}],
    }
    write_json(folder / "sources.json", {**read_json(folder / "sources.json"), "preferences": entry})
    small.set_params({"preference_pairs.origin": "dataset"})
    small.do("preference-pairs", raw="raw-of-others", base="base", mix="mix", teacher="teacher", out="pairs-of-others")
    account = read_json(small / "pairs-of-others/account.json")
    found = {
        name: {why: each["dropped"] for why, each in account[name]["findings"].items()}
        for name in ("preferences", "pairs")
    }
    assert found == {
        "preferences": {"asked in the test": 1, "duplicate": 1, "no accepted": 1},
        "pairs": {"alike": 1, "too long": 1},
    }
    assert account["pairs"]["train"] + account["pairs"]["validation"] == 50
    lengths = account["pairs"]["lengths"]
    assert lengths["chosen_longer"] == 0 and lengths["difference"] < 0 and lengths["auc"] < 0.5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(model, log):
    """llama-cpp-python's own server on loopback; yields its address. It logs a line a request."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512",
               "--n_threads", "1", "--chat_format", "chatml", "--api_key", KEY, "--interrupt_requests", "false"]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        ready = urllib.request.Request(f"{address}/models", headers={"Authorization": f"Bearer {KEY}"})
        for _ in range(300):
            try:
                urllib.request.urlopen(ready, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


@contextmanager
def in_the_way(address, faults):
    """A relay to `address` that answers so many requests with faults before it lets the others through.

    faults: (status, headers) in the order in which requests meet them, with the seconds by which an answer is late if a third
    is given; a status of 0 cuts the line. Yields its address and the list of what it answered.
    """
    left, answered, one_at_a_time = list(faults), [], Lock()

    class Relay(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with one_at_a_time:
                status, headers, *late = left.pop(0) if left else (200, {})
                answered.append(status)
            for seconds in late:
                time.sleep(seconds)
            if status == 0:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if status == 200:
                asked = urllib.request.Request(address.removesuffix("/v1") + self.path, body, dict(self.headers))
                with urllib.request.urlopen(asked) as reply:
                    content = reply.read()
            else:
                content = b'{"error": {"message": "not now"}}'
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", answered
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def gguf(small):
    small.set_params({})
    if not (small / "gguf-teacher").exists():
        small.do("gguf-export", model="base", out="gguf-teacher")
    return small / "gguf-teacher/f16.gguf"


@pytest.fixture
def school(small, tmp_path):
    """A git and DVC repository with the small run's sources, where a teacher is to be asked."""
    (tmp_path / "school").mkdir()
    place = Workplace(tmp_path / "school", made_small={**small.made_small, "preference_pairs.questions": QUESTIONS,
                                                       "preference_pairs.teacher": TEACHER})  # fmt: skip
    shutil.copytree(small / "raw", place / "data/raw")
    (place / "data/teacher").mkdir()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=place.folder, check=True)
    return place


def start_teaching(place, address, *options, key=KEY):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": key, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "stages", "teach", "--base-url", address, "--concurrency", "2", *options]
    return subprocess.Popen(
        command, cwd=place.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def teaching(place, address, *options, key=KEY):
    started = start_teaching(place, address, *options, key=key)
    output, _ = started.communicate()
    return subprocess.CompletedProcess(started.args, started.returncode, output)


def requests_in(log) -> int:
    return len(re.findall(r"POST /v1/chat/completions", log.read_text()))


def replies(place):
    return list(read_rows(place / "data/teacher/replies.jsonl"))


def test_every_problem_is_asked_once_every_reply_kept_and_a_rebuild_asks_nobody(school, gguf, tmp_path):
    log = tmp_path / "server.log"
    with serving(gguf, log) as address:
        done = teaching(school, address, "--price-in", "1000", "--price-out", "2000")
        assert done.returncode == 0, done.stdout
    kept = replies(school)
    assert f"{QUESTIONS} asked, 0 had" in done.stdout and requests_in(log) == len(kept) == QUESTIONS
    assert [row["request"] for row in kept] == sorted(needed_requests(school.folder))
    prompt, completion = (sum(row[f"{kind}_tokens"] for row in kept) for kind in ("prompt", "completion"))
    assert f"{prompt:,} in, {completion:,} out" in done.stdout and prompt > 0 and completion > 0
    assert f"cost: ${prompt / 1e3 + completion / 500:.2f}" in done.stdout
    before = (school / "data/teacher/replies.jsonl").read_bytes()
    assert (school / "data/teacher/replies.jsonl.dvc").is_file()
    again = teaching(school, address)  # nobody is there any more
    assert again.returncode == 0 and f"0 asked, {QUESTIONS} had" in again.stdout
    assert (school / "data/teacher/replies.jsonl").read_bytes() == before
    assert not [path for path in school.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in done.stdout + again.stdout


def test_the_page_s_commands_ask_keep_and_share(school, gguf, tmp_path):
    """`walk` types the section "A teacher" of docs/data.md; the key is another word than the dots there, and reaches no file."""
    for line in ("git config user.name test", "git config user.email test@example.org", f"dvc remote add --default store '{tmp_path}/store'"):
        typed(school.folder, line)
    with serving(gguf, tmp_path / "server.log") as address:
        said = walk(school.folder, "docs/data.md", "A teacher", instead={"http://127.0.0.1:8000/v1": address, "KEY=...": f"KEY={KEY}"})
        counted = json.loads(typed(school.folder, f"OPENAI_API_KEY={KEY} mathmind teach --base-url {address} --json"))
    first, rest, shared = said.values()
    assert "20 asked, 0 had" in first and "cost: $" in first and f"{QUESTIONS - 20} asked, 20 had" in rest and "pushed" in shared
    assert (counted["asked"], counted["had"], counted["dollars"]) == (0, QUESTIONS, 0.0)


def test_killed_in_the_middle_it_goes_on_where_it_was(school, gguf, tmp_path):
    log, part = tmp_path / "server.log", school / ".dvc/tmp/mathmind/teach/replies.jsonl"
    with serving(gguf, log) as address:
        started = start_teaching(school, address)
        while not part.is_file() or part.read_bytes().count(b"\n") < 5:
            assert started.poll() is None, started.stdout.read()
            time.sleep(0.02)
        started.kill()
        started.communicate()
        had = part.read_bytes().count(b"\n")
        part.open("a").write('{"request": "cut off')
        done = teaching(school, address)
        assert done.returncode == 0, done.stdout
    assert f"{QUESTIONS - had} asked, {had} had" in done.stdout
    assert len(replies(school)) == QUESTIONS and not part.exists()
    assert requests_in(log) <= QUESTIONS + 2  # but for those under way when it was killed


def test_a_limit_asks_so_many_and_the_next_run_the_others(school, gguf, tmp_path):
    with serving(gguf, tmp_path / "server.log") as address:
        assert "7 asked, 0 had" in teaching(school, address, "--limit", "7").stdout
        assert f"{QUESTIONS - 7} asked, 7 had" in teaching(school, address).stdout


def test_passing_faults_are_waited_out(school, gguf, tmp_path):
    faults = [(429, {"retry-after": "1"}), (503, {}), (500, {"retry-after-ms": "50"}), (0, {})]
    log, started = tmp_path / "server.log", time.monotonic()
    with serving(gguf, log) as address, in_the_way(address, faults) as (relay, answered):
        done = teaching(school, relay, "--limit", "6")
    assert done.returncode == 0 and "6 asked, 0 had" in done.stdout, done.stdout
    assert sorted(answered) == [0, *[200] * 6, 429, 500, 503] and requests_in(log) == 6
    assert time.monotonic() - started > 1  # as the first fault asked


def test_a_fault_that_stays_is_one_sentence_and_loses_no_reply(school, gguf, tmp_path):
    stays = [(200, {})] * 4 + [(200, {}, 2)] + [(429, {"retry-after-ms": "10"})] * 100
    with serving(gguf, tmp_path / "server.log") as address:
        with in_the_way(address, stays) as (relay, answered):
            done = teaching(school, relay)
        assert done.returncode == 2 and "answers 429 to request" in done.stdout and "Traceback" not in done.stdout
        assert answered.count(429) >= 7 and len(replies(school)) == 5  # the late one too; asked six times more
        assert f"{QUESTIONS - 5} asked, 5 had" in teaching(school, address).stdout


def test_a_wrong_key_a_lost_server_and_an_absent_key_are_one_sentence_each(school, gguf, tmp_path):
    with serving(gguf, tmp_path / "server.log") as address:
        wrong = teaching(school, address, key="sk-another")
    gone = teaching(school, address)
    absent = teaching(school, address, key="")
    sentences = ("refuses the key: set OPENAI_API_KEY to a valid one", "is out of reach", "OPENAI_API_KEY is not set")
    for done, sentence in zip((wrong, gone, absent), sentences):
        assert done.returncode == 2 and sentence in done.stdout and "Traceback" not in done.stdout
        assert "sk-another" not in done.stdout
    assert not (school / "data/teacher/replies.jsonl").exists()


def test_without_a_reply_the_first_missing_request_is_named(small):
    done = pairs(small, accepted="teacher", teacher=TEACHER)
    assert_one_sentence(done, "teacher/replies.jsonl has no reply to request ")
    assert "run `mathmind teach`" in done.stdout
    assert_one_sentence(pairs(small, accepted="teacher"), "preference_pairs.teacher.model is null")


def test_only_a_teacher_s_right_and_whole_answers_become_chosen(small):
    teacher, taught = Teacher(**TEACHER), {}
    for place, problem in enumerate(Sources(small / "raw").problems("reasoning")):
        text = f"I find {problem.answer}.\n#### {problem.answer}" if place % 4 else "I find\n#### 987654"
        finish = "length" if place % 4 == 1 else "stop"
        row = {"request": key_of(request_of(teacher, problem)), "text": text, "finish_reason": finish}
        taught[problem.id] = row
    (small / "teacher").mkdir(exist_ok=True)
    write_rows(small / "teacher/replies.jsonl", sorted(taught.values(), key=lambda row: row["request"]))
    done = pairs(small, accepted="teacher", teacher=TEACHER)
    assert done.returncode == 0, done.stdout
    entry = read_json(small / "out-pairs/account.json")["teacher's answers"]
    found = {why: each["dropped"] for why, each in entry["findings"].items()}
    assert set(found) == {"wrong", "cut off"} and entry["read"] == entry["kept"] + sum(found.values()) == 60
    for row in rows(small):
        assert row["chosen"] == taught[row["id"]]["text"] and row["chosen"].startswith("I find")
        assert taught[row["id"]]["finish_reason"] == "stop" and "987654" not in row["chosen"]


def test_another_temperature_or_prompt_is_another_request(small):
    problem = Sources(small / "raw").problems("reasoning")[0]
    keys = {key_of(request_of(Teacher(**{**TEACHER, **change}), problem)) for change in
            ({}, {"temperature": 0.5}, {"system_prompt": "Answer."}, {"max_tokens": 25}, {"seed": 1}, {"model": "other"})}  # fmt: skip
    assert len(keys) == 6
    body = request_of(Teacher(**TEACHER), problem)
    assert "seed" not in body and json.dumps(body) and body["messages"][1]["content"] == problem.question
