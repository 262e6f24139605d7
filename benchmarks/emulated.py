"""Stages on the emulated processor of another maker and year: do the bytes of dvc.lock come out?

    python benchmarks/emulated.py --cpu Haswell fetch prepare-mix merge@grpo gguf-export@grpo compare

Needs qemu-user. Each stage runs as its launcher would run it, in the working folder, from the inputs that lie there, below a scratch
folder of its own; nothing in the folder changes. An emulated processor is 10 to 40 times slower than a real one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.harness.params import Run, read_params, section  # noqa: E402
from stages.host.engines import Job, Native  # noqa: E402
from stages.host.graph import entry_key, entry_outs, hash_of, lock_stages, read_graph, working_key  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--cpu", default="Haswell", help="one of `qemu-x86_64 -cpu help`")
    chosen = parser.parse_args()
    path = ROOT / "params.yaml"
    values = read_params(path)
    graph, lock = read_graph(ROOT, values), lock_stages(ROOT)
    all_same = True
    for name in chosen.stages:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            for part in ("outs", "checkpoints", "tmp"):
                (scratch / part).mkdir()
            role, *arguments = graph[name].command.split()[1:]
            job = Job(
                image=values["images"][role], stage=graph[name], arguments=tuple(arguments), settings=section(path, values, "run", Run),
                tree=ROOT, local_files=ROOT / "data/local", scratch=scratch, lock=scratch / "lock", asks_hub=False,
            )  # fmt: skip
            started = time.monotonic()
            engine = Native(job)
            done = subprocess.run(["qemu-x86_64", "-cpu", chosen.cpu, *engine.command()], cwd=ROOT, env=engine.environment())
            entry = lock[name]
            same = done.returncode == 0 and all(
                hash_of(scratch / "outs" / out) == md5 for out, md5 in entry_outs(entry).items()
            )
            stale = "" if working_key(ROOT, graph[name], values, lock) == entry_key(entry) else " (the lock is of another run)"
            all_same &= same
            seconds = round(time.monotonic() - started)
            print(f"{name}: {'the same bytes' if same else 'OTHER bytes'} on {chosen.cpu}, {seconds} s{stale}", flush=True)
    sys.exit(0 if all_same else 1)


if __name__ == "__main__":
    main()
