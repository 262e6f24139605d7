"""Tests that run side by side, each worker on its share of the cores."""

import os

import pytest

from stages.host.repro import shares_of_cores


def pytest_configure(config):
    """Keeps each of several workers to its share: on the same cores, the threads of two tests' stages would wait for each other."""
    if worker := getattr(config, "workerinput", None):
        number = int(worker["workerid"].removeprefix("gw"))
        os.sched_setaffinity(0, shares_of_cores(worker["workercount"])[number])


@pytest.fixture
def all_cores():
    """This machine's, where tests that run side by side have each their share."""
    share = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    yield
    os.sched_setaffinity(0, share)
