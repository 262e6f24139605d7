"""Objects in processes of their own: asked, told when they fail, and never left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from stages.harness import measures
from stages.harness.apart import Apart, answers
from stages.harness.errors import InputError
from tests.imports import ROOT
from tests.unit.test_workers import is_running

SOON = 5  # seconds
ORPHANED = """
import time
from stages.harness.apart import Apart
from tests.unit.test_apart import Clerk
if __name__ == "__main__":
    clerk = Apart(Clerk, "")
    clerk.ask("pid")
    print(clerk.answer(), flush=True)
    clerk.ask("sleep", 60)
    time.sleep(60)
"""


class Clerk:
    def __init__(self, refusal: str) -> None:
        if refusal:
            raise InputError(refusal)
        self.asked = 0

    def count(self) -> int:
        self.asked += 1
        measures.note(told_by_a_clerk=self.asked)
        return self.asked

    def variables(self) -> dict[str, str]:
        return dict(os.environ)

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("a clerk's own error")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def clerk():
    started = []

    def start(refusal: str = "", **more) -> Apart:
        started.append(Apart(Clerk, refusal, **more))
        return started[-1]

    yield start
    for each in started:
        each.close()
        assert not is_running(each.process.pid)


def test_it_is_made_once_and_what_it_notes_is_noted_here(clerk):
    one = clerk()
    for _ in range(2):
        one.ask("count")
    assert [one.answer(), one.answer()] == [1, 2]
    assert measures.noted()["told_by_a_clerk"] == 2 and measures.noted()["peak_memory_mib"] > 5


def test_it_sees_its_own_gpu_and_nothing_of_a_rank_and_this_process_keeps_its_environment(clerk, monkeypatch):
    of_a_rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**of_a_rank, "CUDA_VISIBLE_DEVICES": "0,1"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    one = clerk(gpu="1")
    one.ask("variables")
    there = one.answer()
    assert there["CUDA_VISIBLE_DEVICES"] == "1" and not there.keys() & of_a_rank.keys() and there["PATH"] == os.environ["PATH"]
    assert dict(os.environ) == before


def test_what_the_user_can_mend_stays_a_sentence_and_other_errors_tell_where(clerk):
    refusing, one = clerk("mend this"), clerk(name="clerk on GPU 7")
    refusing.ask("count")
    with pytest.raises(InputError, match="^mend this$"):
        refusing.answer()
    one.ask("fail")
    with pytest.raises(RuntimeError, match=r"(?s)^the clerk on GPU 7 failed:\nTraceback.*in fail\n.*a clerk's own error"):
        one.answer()
    one.ask("count")
    assert one.answer() == 1  # it goes on


@pytest.mark.parametrize(("method", "told"), [("fail", "a clerk's own error"), ("sleep", r"the second was killed \(SIGKILL\) before it had answered")])
def test_the_failure_of_one_of_several_is_told_at_once_and_all_end(clerk, method, told):
    first, second = clerk(name="first"), clerk(name="second")
    for each in (first, second):
        each.ask("pid")
    assert answers([first, second]) == [first.process.pid, second.process.pid]
    first.ask("sleep", 60)
    second.ask(method, *([60] if method == "sleep" else []))
    if method == "sleep":
        os.kill(second.process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=told):
        answers([first, second])
    assert time.monotonic() - started < SOON and not is_running(first.process.pid) and not is_running(second.process.pid)


def test_one_that_is_gone_says_so_when_it_is_asked(clerk):
    one = clerk(name="clerk")
    one.ask("pid")
    one.answer()
    os.kill(one.process.pid, signal.SIGTERM)
    one.process.join()
    with pytest.raises(RuntimeError, match=r"^the clerk was killed \(SIGTERM\)"):
        one.ask("pid")


def test_it_ends_with_the_one_that_started_it_though_at_work_and_that_killed():
    started = subprocess.Popen([sys.executable, "-c", ORPHANED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(started.stdout.readline())
    assert is_running(pid)
    started.kill()
    deadline = time.monotonic() + SOON
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
