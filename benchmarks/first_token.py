"""How soon `mathmind chat` answers, from the shell: `python benchmarks/first_token.py [MODEL] [FORM]`.

Starts it cold in a terminal (a process of its own each time) and waits for the first letter on the screen; then takes the
same way apart in processes of their own. Prints medians of ten in seconds. Needs the GGUF files that the graph makes.
"""

import json
import os
import pty
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 10
QUESTION = "Sam has 6 buttons and finds 8 more. Then he loses 2. How many buttons does he have now?"
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")

# What a chat does up to its first token, each part timed as it is first done.
PARTS = """
import json, sys, time
from pathlib import Path
marks = {}
def mark(part):
    global last
    marks[part] = time.monotonic() - last
    last = time.monotonic()
last = float(sys.argv[1])
mark("Python starts")
import stages.__main__
mark("command line")
import rich.console, rich.live, rich.table
mark("import rich")
from stages.host.streaming import Drawing, LlamaCppModel, limits
limits(Path())
mark("read params.yaml")
from stages.inference.llama_cpp_library import llama_cpp
llama_cpp()
mark("import llama_cpp")
model = LlamaCppModel(Path(), sys.argv[2], sys.argv[3])
mark("load the model")
model.prompt.ask(sys.argv[4])
mark("import Jinja, write the prompt")
next(model.answer(sys.argv[4], Drawing(96)))
mark("read the prompt, first token")
print(json.dumps(marks))
"""


def chat(model: str, form: str) -> tuple[float, float]:
    """Seconds from the start of a process to the first letter in its terminal, and the processor's seconds up to its end."""
    start = time.monotonic()
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-m", "stages", "chat", model, "--gguf", form, QUESTION])
    seen = b""
    while not re.search(rb"\w", CONTROL.sub(b"", seen)):
        seen += os.read(terminal, 4096)
    taken = time.monotonic() - start
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:  # a terminal whose other end is closed
        pass
    _, status, used = os.wait4(process, 0)
    if status:
        sys.exit(f"the chat failed: {seen.decode()}")
    return taken, used.ru_utime + used.ru_stime


def parts(model: str, form: str) -> dict[str, float]:
    """The same way, part by part."""
    command = [sys.executable, "-c", PARTS, str(time.monotonic()), model, form, QUESTION]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(model: str = "grpo", form: str = "q4_k_m") -> None:
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    times, used = zip(*(chat(model, form) for _ in range(RUNS)), strict=True)
    taken = [parts(model, form) for _ in range(RUNS)]
    print(f"| {model}, {form}: {RUNS} cold processes | seconds |\n| --- | --- |")
    print(f"| shell to the first letter on the screen, median | {statistics.median(times):.3f} |")
    print(f"| fastest and slowest | {min(times):.3f}, {max(times):.3f} |")
    print(f"| processor's time of the whole chat, which other work does not lengthen much, median | {statistics.median(used):.3f} |")
    for part in taken[0]:
        print(f"| {part} | {statistics.median(run[part] for run in taken):.3f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
