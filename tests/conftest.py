"""Tests that run side by side, each worker on its share of the cores."""

import os


def pytest_configure(config):
    """Keeps each of several workers to its share: on the same cores, the threads of two tests' stages would wait for each other."""
    if worker := getattr(config, "workerinput", None):
        number, count, cores = int(worker["workerid"].removeprefix("gw")), worker["workercount"], sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number * len(cores) // count : (number + 1) * len(cores) // count] or cores)
