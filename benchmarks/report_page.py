"""Measures `mathmind report` on five models' answers to 1,319 problems, each answer of about 300 tokens (1 kB).

    python -m benchmarks.report_page

Builds the page in a process of its own, from its start to its end, and prints its size; where chromium is on PATH and
playwright installed, also how long a browser takes until the answers can be browsed, and until a filter or a key shows.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.finished_run import write_run
from tests.imports import ROOT

PROBLEMS, WORDS, GGUF_PROBLEMS, RUNS = 1319, 170, 200, 5
# Milliseconds from an action to the next frame: what a reader waits for.
UNTIL_SHOWN = """async (act) => {
  const started = performance.now();
  new Function(act)();
  await new Promise((shown) => requestAnimationFrame(() => requestAnimationFrame(shown)));
  return performance.now() - started;
}"""
ACTIONS = {
    "filter": "document.querySelector('#show input[value=wrong]').click()",
    "text": "const q = document.getElementById('query'); q.value = 'mel'; q.dispatchEvent(new Event('input'))",
    "key": "document.querySelector('#list [aria-current]').dispatchEvent("
    "new KeyboardEvent('keydown', { key: 'j', bubbles: true }))",
}


def spread(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def browse(file: Path, chromium: str) -> None:
    """Opens the page several times, each in a fresh context, and prints what it took."""
    from playwright.sync_api import sync_playwright

    measured: dict[str, list[float]] = {"first paint": [], "answers ready": [], **{name: [] for name in ACTIONS}}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        for _ in range(RUNS):
            page = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True).new_page()
            page.goto(file.as_uri())
            page.locator("#browser").wait_for()
            marks = "[performance.getEntriesByName('first-contentful-paint'), performance.getEntriesByName('answers-ready')]"
            page.wait_for_function(f"{marks}.every((found) => found.length)")
            for name, milliseconds in zip(measured, page.evaluate(f"{marks}.map(([mark]) => mark.startTime)")):
                measured[name].append(milliseconds)
            page.evaluate("document.getElementById('answers').scrollIntoView()")
            for name, action in ACTIONS.items():
                measured[name].append(page.evaluate(UNTIL_SHOWN, action))
            page.context.close()
        browser.close()
    for name, milliseconds in measured.items():
        print(f"{name}: {spread(milliseconds)} ms")


with tempfile.TemporaryDirectory() as folder:
    write_run(Path(folder), PROBLEMS, WORDS, GGUF_PROBLEMS)
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "stages", "report"],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds.append(time.perf_counter() - started)
    page = Path(folder, "results/report.html")
    print(f"built in {spread(seconds)} s, {page.stat().st_size:,} bytes")
    if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
        browse(page, chromium)
