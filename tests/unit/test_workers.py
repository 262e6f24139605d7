"""Processes beside each other: results in the rows' order, and an end with the process that started them."""

import subprocess
import sys
import time
from pathlib import Path

from stages.harness.workers import side_by_side
from tests.imports import ROOT

ENDLESS = """
import os, time
from stages.harness.workers import side_by_side
def work(row):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: two of them write at once
    time.sleep(60)
list(side_by_side(work, [1, 2], 2))
"""


def test_results_come_in_the_rows_order_with_any_number_of_processes():
    rows = [0.2, 0.0, 0.1]
    for workers in (0, 1, 2, 5):
        assert list(side_by_side(lambda row: time.sleep(row) or row + 1, rows, workers)) == [(row, row + 1) for row in rows]


def test_processes_end_with_the_one_that_started_them_even_where_it_is_killed():
    started = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(started.stdout.readline()) for _ in range(2)]
    started.kill()
    deadline = time.monotonic() + 5
    while running := [worker for worker in workers if is_running(worker)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
