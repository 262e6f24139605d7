"""Kills the graph at random moments and runs it again, until it is done: do the same bytes come out, and is nothing left behind?

    python benchmarks/chaos.py --kills 100 --json benchmarks/chaos.json

A round is a fresh clone of HEAD with an empty cache. `dvc repro` starts, or with --side-by-side `mathmind repro`; after a time drawn
by chance (log-uniform, so that most are short and some outlast most stages) SIGINT, SIGTERM or SIGKILL goes to it, to its process
group (as a terminal's Ctrl-C does), to a launcher or to a stage; everything must end; it starts again. (DVC itself ignores a SIGINT
that meets it alone while a stage runs, and the run must go on as if there had been none.) Once it ends well, dvc.lock, metrics.json
and every other committed result must be as committed, byte for byte, no process may be left, nothing below the scratch folder, and no
half-moved out. Rounds follow until so many kills are done, and the last round runs to its end.
"""

import argparse
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.host.graph import DVC  # noqa: E402

RESULTS = ("dvc.lock", "metrics.json", "results/metrics", "results/comparison.json", "results/plots")
TARGETS = {"dvc": None, "dvc's group": None, "launcher": "stages.host.launcher", "stage": "stages.harness.run_stage"}
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
SHORTEST, LONGEST = 0.5, 60.0  # seconds between a start and a kill; two stages take 80, and go on from their checkpoints
PATIENCE = 30.0  # seconds in which everything must have ended after a kill
BESIDE = 240.0  # the same where stages run side by side: one beside another that was killed comes to its end


@dataclass
class Kill:
    """One kill, and what came of it."""

    round: int
    after: float  # seconds from the start of dvc
    signal: str
    target: str
    stage: str  # that was running; "" between two
    ended: float | None  # seconds until no process was left; None where DVC ignored it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side-by-side", action="store_true", help="start `mathmind repro`, which has several stages run at a time")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    chosen = parser.parse_args()
    draw, kills, fixes, faults = random.Random(chosen.seed), [], [], []
    started = time.monotonic()
    while len(kills) < chosen.kills:
        number = 1 + (kills[-1].round if kills else 0)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            clone = Path(folder) / "clone"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            (clone / "metrics.json").unlink()  # or DVC would leave compare out, where all that it reads came out as committed
            while not run(clone, chosen.side_by_side, number, draw, chosen.kills - len(kills), kills, fixes):
                pass
            faults += [f"round {number}: {fault}" for fault in left_behind(clone)]
            print(f"round {number}: done after {len(kills)} kills, {len(faults)} faults so far", flush=True)
    figures = {
        "kills": len(kills),
        "rounds": kills[-1].round,
        "seconds": round(time.monotonic() - started),
        "faults": faults,
        "mended": fixes,  # DVC writes two of its files in place
        "ignored": sum(kill.ended is None for kill in kills),
        "slowest_end": max(kill.ended for kill in kills if kill.ended is not None),
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(figures | {"all": [asdict(kill) for kill in kills]}, indent=2) + "\n")
    show(figures, kills)
    sys.exit(1 if figures["faults"] else 0)


def run(clone: Path, side_by_side: bool, number: int, draw: random.Random, left: int, kills: list[Kill], fixes: list[str]) -> bool:
    """One start of the graph, killed after a while if any kills are left; whether it ended well. Adds its kills, and what had to be mended."""
    program, patience = ((sys.executable, "-m", "stages"), BESIDE) if side_by_side else (DVC, PATIENCE)
    log = clone.parent / "dvc.log"
    environment = {**os.environ, "MATHMIND_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    with log.open("w") as file:
        dvc = subprocess.Popen(
            [*program, "repro"], cwd=clone, env=environment, stdout=file, stderr=file, process_group=0, preexec_fn=heed_ctrl_c
        )
    while True:
        after = math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))) if left else None
        name, signal_name = draw.choice(list(TARGETS)), draw.choice(SIGNALS)
        try:
            status = dvc.wait(after)
            break
        except subprocess.TimeoutExpired:
            pass
        family = psutil.Process(dvc.pid).children(recursive=True)
        lines = {process: command_of(process) for process in family}
        stage = next((line[line.index(TARGETS["stage"]) + 1] for line in lines.values() if TARGETS["stage"] in line), "")
        chosen = next((process for process, line in lines.items() if TARGETS[name] in line), None)
        name = name if chosen or name == "dvc's group" else "dvc"
        ignored = name == "dvc" and signal_name == "SIGINT" and ignores_interrupts(dvc)
        send = os.killpg if name == "dvc's group" else os.kill
        send(chosen.pid if chosen else dvc.pid, getattr(signal, signal_name))
        kills.append(Kill(number, round(after, 2), signal_name, name, stage, None if ignored else await_end(dvc, family, patience)))
        left -= 1
        if not ignored:
            if math.isnan(kills[-1].ended):
                sys.exit(f"after {patience:.0f} s not all had ended: {kills[-1]}: {[command_of(process) for process in family]}")
            return False
    if status:  # nobody killed this one: it refused to go on from what the last kill left
        refused = f"dvc repro ended with {status} after {kills[-1:]}: {log.read_text()[-500:]}"
        print(refused, flush=True)
        fixes.append(mend(clone) or sys.exit("mathmind doctor has no help for that"))
    return not status


def mend(clone: Path) -> str | None:
    """Does what `mathmind doctor` says where a kill has cut off a file that DVC was writing; what that was."""
    asked = subprocess.run([sys.executable, "-m", "stages", "doctor", "--json"], cwd=clone, capture_output=True, text=True)
    found = json.loads(asked.stdout)[0]
    if found["state"] == "ok":
        return None
    subprocess.run(shlex.split(found["fix"]), cwd=clone, check=True)
    return found["fix"]


def heed_ctrl_c() -> None:
    """A shell's background jobs ignore it, and hand that down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignores_interrupts(process: subprocess.Popen) -> bool:
    """While a stage runs, DVC leaves a Ctrl-C to it (dvc/stage/run.py)."""
    ignored = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def await_end(dvc: subprocess.Popen, family: list[psutil.Process], patience: float) -> float:
    """Seconds until dvc and all that it had started are gone, or NaN."""
    started = time.monotonic()
    while time.monotonic() - started < patience:
        if dvc.poll() is not None and not any(process.is_running() for process in family):
            return round(time.monotonic() - started, 2)
        time.sleep(0.02)
    return math.nan


def left_behind(clone: Path) -> list[str]:
    """What is not as it must be in a clone whose graph is done."""
    faults = []
    changed = subprocess.run(["git", "diff", "--name-only", "--", *RESULTS], cwd=clone, capture_output=True, text=True, check=True)
    faults += [f"{path} came out otherwise" for path in changed.stdout.splitlines()]
    faults += [f"{path.relative_to(clone)} is left of a move" for path in clone.rglob(".*.incoming")]
    scratch = clone / ".dvc" / "tmp" / "mathmind"
    faults += [f"{path.relative_to(clone)} is left" for path in scratch.rglob("*") if path.is_file() and path.suffix != ".lock"]
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(clone):
                faults.append(f"process {process.pid} still runs: {process.cmdline()}")
        except psutil.Error:
            pass
    return faults


def show(figures: dict, kills: list[Kill]) -> None:
    counted = Counter((kill.target, kill.signal) for kill in kills)
    table = Table("killed", *SIGNALS)
    for target in TARGETS:
        table.add_row(target, *(str(counted[target, name]) for name in SIGNALS))
    Console().print(table)
    during = Counter(kill.stage or "between two stages" for kill in kills)
    print("while this ran:", ", ".join(f"{stage} {count}" for stage, count in during.most_common()))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
