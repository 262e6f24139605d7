"""GPUs as locks: who asks gets those that are free, and waits for the others."""

import threading
from contextlib import ExitStack

import pytest

from stages.harness.errors import InputError
from stages.host.gpus import free_gpus, seen_gpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Says which GPUs a machine has, and which of them the caller lets be seen."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def describe(seen=None, driver=()):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if seen:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        if driver:
            lines = "".join(f"echo '{number}, {identity}'\n" for number, identity in enumerate(driver))
            (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
            (tmp_path / "bin/nvidia-smi").chmod(0o755)
        return tmp_path

    return describe


def test_each_run_gets_a_gpu_that_is_free(machine):
    folder = machine(seen="3,5")
    with free_gpus(folder, 1) as first, free_gpus(folder, 1) as second:
        assert (first, second) == (["3"], ["5"])
    with free_gpus(folder, 2) as both:
        assert both == ["3", "5"]


@pytest.mark.parametrize("count", [1, 2])
def test_who_finds_too_few_waits_says_so_and_holds_none_meanwhile(machine, capfd, count):
    folder, got = machine(seen="0,1"), []

    def ask():
        with free_gpus(folder, count) as gpus:
            got.append(gpus)

    with ExitStack() as held:
        held.enter_context(free_gpus(folder, 2 if count == 1 else 1))
        waiting = threading.Thread(target=ask)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and "docker/run: waiting for" in capfd.readouterr().err
        if count == 2:
            with free_gpus(folder, 1) as other:
                assert other == ["1"]
    waiting.join(10)
    assert got == [["0", "1"][:count]]


def test_without_a_word_from_the_caller_all_gpus_of_the_driver_are_tried(machine):
    folder = machine(driver=["GPU-a", "GPU-b"])
    with free_gpus(folder, 1) as first, free_gpus(folder, 1) as second:
        assert (first, second) == (["0"], ["1"])


def test_a_lock_is_of_the_gpu_itself_for_another_job_of_a_cluster_numbers_anew(machine):
    folder = machine(seen="0", driver=["GPU-a"])
    with free_gpus(folder, 1):
        machine(seen="0", driver=["GPU-b"])
        with free_gpus(folder, 1) as other:
            assert other == ["0"]


def test_fewer_gpus_than_a_profile_asks_for_are_one_sentence(machine):
    machine(seen="0")
    with pytest.raises(InputError, match=r"run\.gpus is 2, and CUDA_VISIBLE_DEVICES=0 names 1: lower it"):
        seen_gpus(2, [])
    machine()
    with pytest.raises(InputError, match=r"run\.gpus is 2, and nvidia-smi shows 1: lower it"):
        seen_gpus(2, ["0"])
    assert seen_gpus(2, []) == ["0", "1"]
