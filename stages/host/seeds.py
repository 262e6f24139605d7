"""`mathmind seeds`: the same recipe under other seeds, as DVC experiments, and what came of them in results/seeds.json.

One seed says nothing of chance in training; the interval of a score only covers chance in the test problems. A run is
taken in if its stage had the same command, parameters and inputs as the committed one, the seed apart. It counts for as long
as the committed run has the results that it had beside it: an input that changes no bit, such as an image's recipe, leaves it.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.harness.params import read_params, section_of
from stages.host.graph import DVC, entry_deps, entry_outs, parse_yaml, read_yaml, run_key

SEEDED = ("base-model", "preference-pairs", "sft", "qlora", "grpo", "orpo")  # stages with a seed of their own
RUNS = Path("results/seeds.json")


def queue(folder: Path, stages: tuple[str, ...], n: int) -> list[str]:
    """Queues experiments so that each stage has `n` seeds, the committed run's counted; returns the names queued.

    Raises InputError for a stage without a seed, or when DVC refuses.
    """
    params, known = read_params(folder / "params.yaml"), _read(folder)
    lock = read_yaml(folder / "dvc.lock")
    recipes, results = recipe_keys(lock), result_keys(lock)
    queued = []
    for stage in stages:
        if stage not in SEEDED:
            raise InputError(f"{stage} has no seed of its own: name one or more of {', '.join(SEEDED)}")
        if stage not in recipes:
            raise InputError(f"dvc.lock has no {stage}: run `dvc repro` first")
        own = params[section_of(stage)]["seed"]
        first = params["seed"] if own is None else own
        for seed in range(first + 1, first + n):
            asked = (stage, seed, results[stage])
            if asked in [(run["stage"], run["seed"], run["results"]) for run in known.values()]:
                continue
            name = f"{stage}-seed-{seed}-{results[stage][:6]}"
            change = f"{section_of(stage)}.seed={seed}"
            _run(folder, *DVC, "exp", "run", "--queue", "--name", name, "--set-param", change)
            known[name] = {"stage": stage, "seed": seed, "recipe": recipes[stage], "results": results[stage],
                           "models": None, "pairs": None}  # fmt: skip
            queued.append(name)
    write_json(folder / RUNS, known)
    return queued


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """Adds the scores of finished experiments to results/seeds.json; returns its runs beside dvc.lock's results, by name.

    `models` and `pairs` of a run are its metrics.json's, or None while there is none: waiting, or failed (`dvc queue
    status`).
    """
    known = _read(folder)
    for name, run in known.items():
        if run["models"] is None and (commit := experiments(folder).get(name)):
            lock = parse_yaml(_run(folder, "git", "show", f"{commit}:dvc.lock"))
            if recipe_keys(lock).get(run["stage"]) == run["recipe"]:
                run |= json.loads(_run(folder, "git", "show", f"{commit}:metrics.json"))
    if known:
        write_json(folder / RUNS, known)
    results = result_keys(read_yaml(folder / "dvc.lock"))
    return {name: run for name, run in known.items() if results.get(run["stage"]) == run["results"]}


def recipe_keys(lock: dict[str, Any]) -> dict[str, str]:
    """What each seeded stage of a dvc.lock was made of, its seed apart, as 16 hex digits."""
    keys = {}
    for stage in SEEDED:
        if entry := lock.get("stages", {}).get(stage):
            section = section_of(stage)
            params = entry["params"]["params.yaml"]
            seedless = {name: value for name, value in params[section].items() if name != "seed"}
            keys[stage] = run_key(entry["cmd"], {section: seedless}, entry_deps(entry))
    return keys


def result_keys(lock: dict[str, Any]) -> dict[str, str]:
    """What each seeded stage of a dvc.lock made, and what every model then scored, as 16 hex digits."""
    made = {name: entry_outs(entry) for name, entry in lock.get("stages", {}).items()}
    scores = {"metrics.json": made.get("compare", {}).get("metrics.json")}
    return {stage: run_key(stage, {}, made[stage] | scores) for stage in SEEDED if stage in made}


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    return read_json(folder / RUNS) if (folder / RUNS).is_file() else {}


def experiments(folder: Path) -> dict[str, str]:
    """The commits of finished experiments by name; DVC keeps them as git references."""
    lines = _run(folder, "git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    found = (line.split() for line in lines)
    return {reference.rsplit("/", 1)[1]: commit for reference, commit in found if reference.count("/") == 4}


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"`{' '.join(command[-4:])}` ended with {done.returncode}: {last}")
    return done.stdout
