"""`mathmind chat` and `mathmind serve` as a user runs them, on small models that the stages have made."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from stages.corpus.marks import STOP_TOKENS
from stages.harness.jsonl import read_rows, write_json
from stages.host.models import prompt_of
from stages.host.streaming import Drawing, Limits, llama_settings, load, read_gguf
from stages.inference.asking import until_stop_text
from stages.inference.engine import Sampling
from stages.inference.llama_cpp_engine import LlamaCppEngine
from tests.imports import ROOT
from tests.pipeline.conftest import set_dotted

KEY = "key-of-the-test"
CUT_OFF = "ERROR:    ASGI callable returned without completing response.\n"  # which is true, and well to know
LONG = 20_000  # tokens: seconds, even for a tiny model
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def place(small, tmp_path_factory) -> Path:
    """A project's folder with two models, base and qlora, and one that never stops: the base without stop tokens, as grpo."""
    import torch
    from ruamel.yaml import YAML
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(small / "merged")
    endless = AutoModelForCausalLM.from_pretrained(small / "base")
    with torch.no_grad():
        endless.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))] = 0
    endless.save_pretrained(small / "endless")
    tokenizer.save_pretrained(small / "endless")
    (folder / "models/gguf").mkdir(parents=True)
    (folder / "models/merged").mkdir()
    for name, weights in {"qlora": "merged", "base": "base", "grpo": "endless"}.items():
        small.do("gguf-export", model=weights, out=f"chat-{name}")
        (folder / f"models/gguf/{name}").symlink_to(small / f"chat-{name}")
    (folder / "models/merged/qlora").symlink_to(small / "merged")
    (folder / "models/base").symlink_to(small / "base")
    (folder / "data").mkdir()
    (folder / "data/mix").symlink_to(small / "mix")
    (folder / "results/metrics").mkdir(parents=True)
    write_json(folder / "results/metrics/base.json", {"prompt": "few_shot"})
    params = YAML(typ="safe").load((small / "params.yaml").read_text(encoding="utf-8"))
    set_dotted(params, "eval_gguf.context", LONG)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(params, file)
    return folder


@pytest.fixture(scope="module")
def questions(place) -> list[str]:
    return [row["question"] for row in read_rows(place / "data/mix/test.jsonl")]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "stages", *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TERM": "xterm",
            "COLUMNS": "100", "PROMPT_TOOLKIT_NO_CPR": "1", **more}  # fmt: skip


def mathmind(place: Path, *words: str, asked: str | bytes | None = None) -> subprocess.CompletedProcess:
    given = asked.encode() if isinstance(asked, str) else asked or b""
    done = subprocess.run(command(*words), cwd=place, env=environment(), input=given, capture_output=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def rows_of(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Terminal:
    """A chat in a terminal of its own, written to and read as a person does."""

    def __init__(self, place: Path, *words: str) -> None:
        self.pid, self.end = pty.fork()
        if not self.pid:
            os.chdir(place)
            os.execve(sys.executable, command(*words), environment())
        self.seen, self.after = "", 0

    def type(self, text: str) -> None:
        self.after = len(self.seen)
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Reads on until what came since the last typing shows the pattern, and returns it."""
        while not re.search(pattern, self.shown(), re.DOTALL):
            self.read()
        return self.shown()

    def shown(self) -> str:
        """What has come since then; <prompt> stands where the prompt begins to read, and <asked> where it has a question."""
        shown = self.seen[self.after :].replace("\x1b[?2004h", "<prompt>").replace("\x1b[?2004l", "<asked>")
        return CONTROL.sub("", shown).replace("\r", "")

    def read(self) -> None:
        self.seen += os.read(self.end, 65536).decode(errors="replace")

    def status(self) -> int:
        """Reads to the end, and returns how the chat exited."""
        try:
            while True:
                self.read()
        except OSError:  # the other end has closed
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("name", ["qlora", "base"])
def test_a_chat_says_letter_for_letter_what_eval_gguf_scores(place, questions, name):
    found = rows_of(mathmind(place, "chat", name, "--gguf", "q8_0", "--json", asked="\n".join(questions[:30])))
    engine = LlamaCppEngine(place / f"models/gguf/{name}/q8_0.gguf", sequences=8, context=384)
    prompt = prompt_of(place, name, engine.template)
    way = "few_shot" if name == "base" else "own"
    wanted = [until_stop_text(said, way) for said in engine.generate([prompt.ask(text) for text in questions[:30]], Sampling(96))]
    engine.close()
    assert [row["question"] for row in found] == questions[:30]
    assert [row["completion"] for row in found] == [said.text for said in wanted]
    assert [row["finish_reason"] for row in found] == [said.finish_reason for said in wanted]
    if name == "qlora":  # of the base the engine counts on to the question that it asks itself
        assert [row["tokens"] for row in found] == [said.tokens for said in wanted]


def test_three_questions_in_a_pipe_give_three_answers_without_colours(place, questions):
    asked = f"{questions[0]}\n\n{questions[1]}\n{questions[2]}"
    done = mathmind(place, "chat", "qlora", asked=asked)
    blocks = done.stdout.removesuffix("\n").split("\n\n")
    rows = rows_of(mathmind(place, "chat", "qlora", "--json", asked=asked))
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    assert blocks == ["\n".join(filter(None, [row["working"], f"answer: {row['answer'] or 'none'}"])) for row in rows]
    assert len(blocks) == 3 and any(row["answer"] for row in rows)


def test_two_models_answer_side_by_side_and_it_is_said_whether_they_agree(place, questions):
    asked = "\n".join(questions[:10])
    both = rows_of(mathmind(place, "chat", "qlora", "--against", "base", "--json", asked=asked))
    alone = {name: rows_of(mathmind(place, "chat", name, "--json", asked=asked)) for name in ("qlora", "base")}
    for place_, row in enumerate(both):
        for name, said in row["models"].items():
            assert said.items() <= alone[name][place_].items()
        answers = [said["answer"] for said in row["models"].values()]
        assert row["agree"] == (answers[0] == answers[1] and answers[0] is not None)
    text = mathmind(place, "chat", "qlora", questions[0], "--against", "base").stdout
    assert re.fullmatch(r"qlora:\n.*\nbase:\n.*\n(the answers (agree|differ): .*|neither declares an answer)\n", text, re.DOTALL)


def test_a_seed_draws_the_same_answers_again_and_another_one_others(place, questions):
    said = [
        [row["completion"] for row in rows_of(mathmind(
            place, "chat", "qlora", "--json", "--temperature", "1.5", "--top-p", "0.9", "--seed", seed, asked="\n".join(questions[:5])
        ))] for seed in ("1", "1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] != said[2]


def test_an_answer_is_no_longer_than_it_may_be(place):
    (row,) = rows_of(mathmind(place, "chat", "grpo", "Why?", "--json", "--max-tokens", "7"))
    assert (row["tokens"], row["finish_reason"]) == (7, "length")


@pytest.mark.parametrize("name", ["qlora", "base"])
def test_transformers_says_token_by_token_what_its_own_generate_says(place, questions, name):
    model = load(place, name, "transformers", None)
    for question in questions[:2]:
        *begun, last = model.answer(question, Drawing(96))
        (whole,) = model.engine.generate([model.prompt.ask(question)], Sampling(96))
        wanted = until_stop_text(whole, "few_shot" if name == "base" else "own")
        assert (last.text, last.finish_reason) == (wanted.text, wanted.finish_reason)
        assert len(begun) >= last.tokens - 1 and all(wanted.text.startswith(answer.text) for answer in begun)


def test_transformers_stops_when_it_is_no_longer_heard(place):
    running = threading.active_count()
    answer = load(place, "qlora", "transformers", None).answer("Why?", Drawing(LONG, temperature=2.0))
    next(answer)
    answer.close()
    assert threading.active_count() == running


def test_neither_torch_nor_pydantic_is_waited_for(place):
    code = "import sys; from stages.__main__ import main; main(['chat', 'qlora', 'Why?'], standalone_mode=False); print(list(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and not {"'torch'", "'pydantic'", "'prompt_toolkit'"} & set(re.findall(r"'\w+'", done.stdout)), done.stderr


def test_at_a_prompt_working_and_answer_stand_apart_and_ctrl_d_ends(place, questions):
    (row,) = [row for row in rows_of(mathmind(place, "chat", "qlora", "--json", asked="\n".join(questions[:20]))) if row["answer"]][:1]
    chat = Terminal(place, "chat", "qlora")
    chat.wait_for("<prompt>")
    chat.type(f"{row['question']}\r")
    shown = chat.wait_for(rf"<asked>.*\n{row['answer']}\s*\n.*<prompt>")
    assert row["working"].splitlines()[-1] in shown and "<SOLUTION>" not in shown and "####" not in shown
    assert re.search(rf"\x1b\[1;32m{row['answer']}\x1b", chat.seen)
    chat.type("\x04")
    assert chat.status() == 0
    assert row["question"] in (place / ".dvc/tmp/mathmind/chat/history").read_text(encoding="utf-8")


def test_a_paste_of_several_lines_is_one_question(place):
    chat = Terminal(place, "chat", "qlora", "--max-tokens", "1")
    chat.wait_for("<prompt>")
    chat.type("\x1b[200~one\ntwo\x1b[201~")
    chat.wait_for("two")
    chat.type("\r")
    chat.wait_for("cut off at 1 tokens.*<prompt>")
    chat.type("\x04")
    assert chat.status() == 0
    assert "+one\n+two\n" in (place / ".dvc/tmp/mathmind/chat/history").read_text(encoding="utf-8")


def test_ctrl_c_stops_an_answer_and_a_second_one_ends_the_chat(place):
    chat = Terminal(place, "chat", "grpo", "--max-tokens", str(LONG))
    chat.wait_for("<prompt>")
    for _ in range(2):  # the chat goes on
        chat.type("Why?\r")
        chat.wait_for(r"<asked>\s*\S")
        chat.type("\x03")
        chat.wait_for(r"\(stopped\).*<prompt>")
    chat.type("\x03")
    assert chat.status() == 0


def test_ctrl_c_ends_a_chat_of_one_question(place):
    chat = Terminal(place, "chat", "grpo", "Why?", "--against", "base", "--max-tokens", str(LONG))
    chat.wait_for(r"grpo\s+base\s+\S+")
    chat.type("\x03")
    assert chat.status() == 130 and "(stopped)" in chat.shown()


@pytest.mark.parametrize(("words", "sentence"), [
    (["chat", "gpt"], "Invalid value for 'MODEL': 'gpt' is not one of 'base', 'sft', 'qlora', 'grpo', 'orpo'."),
    (["chat", "orpo", "Why?"], "orpo has no GGUF file in models/gguf/orpo: run `dvc repro gguf-export@orpo`"),
    (["serve", "orpo"], "orpo has no GGUF file in models/gguf/orpo: run `dvc repro gguf-export@orpo`"),
    (["chat", "qlora", "--gguf", "q5", "Why?"], "models/gguf/qlora has no q5.gguf: name one of f16, q4_k_m, q8_0"),
    (["chat", "grpo", "--engine", "transformers", "Why?"], "models/merged/grpo holds no model: run `dvc repro merge@grpo`"),
    (["chat", "qlora", "--engine", "transformers", "--gguf", "f16", "Why?"], "--gguf names a file of llama.cpp"),
    (["chat", "qlora", "--engine", "vllm", "Why?"], "vllm is not installed here"),
    (["chat", "qlora", "--against", "qlora", "Why?"], "--against qlora is qlora itself"),
    (["chat", "qlora", "word " * LONG], "tokens, and qlora reads fewer than"),
    (["serve", "qlora", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000"),
])  # fmt: skip
def test_what_cannot_be_asked_is_said_in_one_sentence(place, words, sentence):
    done = mathmind(place, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("text", "sentence"), [
    (None, "params.yaml is missing: copy a profile there"),
    ("eval_gguf: [", "params.yaml, line 1: "),
    ("eval_gguf: {context: 384, threads: 0, max_new_tokens: 96}", "params.yaml: eval_gguf.threads is 0 and must be a whole number above 0"),
    ("seed: 0", "params.yaml: eval_gguf.max_new_tokens is None"),
])  # fmt: skip
def test_what_is_wrong_with_params_is_said_in_one_sentence(tmp_path, text, sentence):
    if text:
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    done = mathmind(tmp_path, "chat", "qlora", "Why?")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_line_that_is_no_text_is_named_after_those_before_it_are_answered(place):
    done = mathmind(place, "chat", "qlora", "--json", asked=b"Why?\n\xff\n")
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 1)
    assert "standard input, line 2: not UTF-8" in done.stderr


def test_a_base_whose_best_prompt_is_not_known_says_which_stage_finds_it(place):
    known = place / "results/metrics/base.json"
    kept = known.read_bytes()
    known.unlink()
    done = mathmind(place, "chat", "base", "Why?")
    known.write_bytes(kept)
    assert done.returncode == 2 and "run `dvc repro eval@base`" in done.stderr


@contextmanager
def server(place: Path, *words: str, **more: str):
    """A server, and the line that it says to try; stopped by Ctrl-C, which must end it well and free its port."""
    serving = subprocess.Popen(command("serve", *words, "--port", "0"), cwd=place, env=environment(**more), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    lines = [serving.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("curl "), serving.communicate()
    port = int(re.search(r":(\d+)/", lines[1])[1])
    try:
        yield port, lines[1]
    finally:
        serving.send_signal(signal.SIGINT)
        _, complaints = serving.communicate(timeout=30)
    assert (serving.returncode, complaints.replace(CUT_OFF, "")) == (0, "")
    socket.create_server(("127.0.0.1", port)).close()


@pytest.fixture(scope="module")
def served(place):
    with server(place, "qlora", MATHMIND_API_KEY=KEY) as (port, line):
        yield port, line


def client(port: int, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_streamed_reply_is_the_text_of_a_chat_whatever_was_asked_before(place, questions, served):
    wanted = rows_of(mathmind(place, "chat", "qlora", "--json", asked="\n".join(questions[:10])))
    asking = client(served[0]).chat.completions
    for row in wanted * 2:
        stream = asking.create(model="qlora", messages=messages(row["question"]), max_tokens=96, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == row["completion"]
        assert chunks[-1].finish_reason == row["finish_reason"]
    whole = asking.create(model="qlora", messages=messages(questions[0]), temperature=0, max_tokens=96)
    assert (whole.model, whole.choices[0].message.content) == ("qlora", wanted[0]["completion"])


def test_the_line_to_try_is_true_as_printed(place, served):
    done = subprocess.run(["sh", "-c", f"curl() {{ command curl --silent --show-error \"$@\"; }}; {served[1]}"],
                          env=environment(MATHMIND_API_KEY=KEY), capture_output=True, text=True)  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr


def test_the_server_names_its_model_and_refuses_another_key(served):
    assert [model.id for model in client(served[0]).models.list()] == ["qlora"]
    with pytest.raises(openai.AuthenticationError):
        client(served[0], "another").models.list()


def test_either_stop_token_ends_a_reply(place, served):
    from transformers import AutoTokenizer

    for token in STOP_TOKENS:
        id = AutoTokenizer.from_pretrained(place / "models/merged/qlora").convert_tokens_to_ids(token)
        reply = client(served[0]).chat.completions.create(
            model="qlora", messages=messages("Why?"), temperature=0, max_tokens=9, logit_bias={str(id): 1000}
        )
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "stop")


def test_the_base_is_served_in_its_best_prompt_and_stops_before_the_next_question(place, questions):
    wanted = rows_of(mathmind(place, "chat", "base", "--json", asked="\n".join(questions[:5])))
    with server(place, "base") as (port, _):
        for row in wanted:
            reply = client(port).chat.completions.create(model="base", messages=messages(row["question"]), max_tokens=96)
            assert reply.choices[0].message.content == row["completion"]


def test_a_reply_under_way_does_not_keep_the_server_from_ending(place):
    with server(place, "grpo") as (port, _):
        stream = client(port).chat.completions.create(model="grpo", messages=messages("Why?"), temperature=0, stream=True)
        next(iter(stream))
        started = time.monotonic()
    assert time.monotonic() - started < 20


def test_the_server_asks_in_the_ids_of_the_model_s_own_tokenizer(place, questions):
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    from stages.host.serve import HANDLER, register_handler

    tokenizer = AutoTokenizer.from_pretrained(place / "models/merged/qlora")
    register_handler(place, "qlora")
    file = place / "models/gguf/qlora/q4_k_m.gguf"
    assert read_gguf(file, Limits(96, 384, 1)).metadata["tokenizer.chat_template"] == tokenizer.chat_template
    llama = Llama(str(file), chat_format=HANDLER, **llama_settings(Limits(96, 384, 1)))
    for question in questions[:100]:
        wanted = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_dict=False)
        reply = llama.create_chat_completion(messages(question), max_tokens=1, temperature=0)
        assert reply["usage"]["prompt_tokens"] == len(wanted)
        assert llama.input_ids[: len(wanted)].tolist() == wanted


def test_a_server_that_others_reach_warns_where_it_asks_for_no_key(place):
    done = mathmind(place, "serve", "orpo", "--host", "0.0.0.0")
    assert done.stderr.startswith("warning: whoever reaches 0.0.0.0 can ask orpo: give --api-key")
    assert "warning" not in mathmind(place, "serve", "orpo", "--host", "0.0.0.0", "--api-key", KEY).stderr
