"""What a container adds to a stage: `python benchmarks/container_start.py docker podman`.

Runs a small fetch natively and by each engine in turn, in a clone, and takes off what the stage itself took (an image's
Python may be the faster one); prints the median of what is left of docker/run's wall time in seconds, and what the engine
adds to the native one. Build the image first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 10
FETCH = ["docker/run", "export", "fetch", "--sources-lock", "params/sources.lock.yaml", "--out", "data/raw"]


def main(engines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        params = Path(folder, "params.yaml")
        text = params.read_text(encoding="utf-8").replace("rows: 20000", "rows: 100")
        environment = {**os.environ, "MATHMIND_PYTHON": sys.executable}
        times: dict[str, list[float]] = {engine: [] for engine in ("native", *engines)}
        for _ in range(RUNS + 1):
            for engine, taken in times.items():
                params.write_text(text.replace("engine: native", f"engine: {engine}"), encoding="utf-8")
                start = time.monotonic()
                subprocess.run(FETCH, cwd=folder, env=environment, check=True, capture_output=True)
                wall = time.monotonic() - start
                record = json.loads(Path(folder, "results/timing/fetch.json").read_text())
                taken.append(wall - record["seconds"])
    medians = {engine: statistics.median(taken[1:]) for engine, taken in times.items()}  # the first warms the disk's cache
    print("| engine | docker/run around the stage, s | more than native, s |\n| --- | --- | --- |")
    for engine, median in medians.items():
        print(f"| {engine} | {median:.2f} | {median - medians['native']:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
