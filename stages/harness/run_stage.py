"""The small entry of every stage, in every engine: `python -m stages.harness.run_stage orpo --base ... --out ...`.

The launcher (docker/run) calls it with the working folder as the current one, inputs as dvc.yaml names them, outs below
the scratch folder, and `--scratch`. A stage's `run` may also ask for `checkpoints` (a folder that outlives a killed
run), `local_files` (where the user keeps files that no hub serves) and `workers` (how many processes it may start).
"""

import errno
import gc
import importlib
import importlib.metadata
import inspect
import os
import platform
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from stages.harness import measures, ranks
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json
from stages.harness.params import STAGES, read_params, section, section_of
from stages.harness.processes import die_with_parent

PARAMS = Path("params.yaml")
TREE = Path(__file__).resolve().parents[2]
MAY_ASK_THE_HUB = {"fetch", "base-model"}  # the launcher tells it to these alone, where a parameter names a source there
HASH_WORDS = {"prepare-mix", "preference-pairs"}  # by datasketch, which imports scipy
# Objects made between two searches for cycles, none of which then falls into the imports: these leave 800,000 objects, with vLLM more than
# a million, and a search among them takes long. A training leaves some hundred objects in cycles at its start, and none by its updates.
GARBAGE = 3_000_000
PATIENCE = 3.0  # seconds in which a process that failed for want of another is ended, so that the other's failure is the one told
RECORD = "stage.json"  # in the scratch folder: what the run measured, for the launcher's timing record


def main(arguments: list[str]) -> int:
    """Runs one stage and returns its exit status: 0, or 2 after one sentence about what the user can mend."""
    gc.set_threshold(GARBAGE)
    if ranks.size() > 1:
        die_with_parent(int(os.environ[ranks.STARTER]), by=signal.SIGKILL)
    try:
        stage, paths = _parse(arguments)
        _spare_imports(stage)
        _run(stage, paths)
    except InputError as error:
        print(f"{arguments[0] if arguments else 'run_stage'}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _failed(error)
        print(f"{arguments[0]}: the disk is full at {error.filename or 'the scratch folder'}: free some space and run "
              "again; nothing that was there before is lost", file=sys.stderr)  # fmt: skip
        return 2
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Leaves an error to Python where one process runs; one of several shows it and lets nothing keep it from its end."""
    if ranks.size() == 1:
        raise error
    if isinstance(error, RuntimeError):  # as torch's words that another is gone are
        time.sleep(PATIENCE)
    traceback.print_exception(error)
    return 1


def _parse(arguments: list[str]) -> tuple[str, dict[str, Path]]:
    stage, *rest = arguments or [""]
    if stage not in STAGES:
        raise InputError(f"unknown stage {stage!r}: expected one of {', '.join(STAGES)}")
    if len(rest) % 2 or any(not name.startswith("--") for name in rest[::2]):
        raise InputError(f"expected pairs of --name PATH after the stage, found {' '.join(rest)}")
    return stage, {section_of(name[2:]): Path(path) for name, path in zip(rest[::2], rest[1::2])}


def _spare_imports(stage: str) -> None:
    """To trl, transformers and vLLM some packages are not installed: they would import them, and a stage has no use for them."""
    sys.modules["wandb"] = None  # half a second; a stage reports to nobody
    sys.modules["sklearn"] = None  # a second where a machine's own Python has it
    if stage not in HASH_WORDS:
        sys.modules["scipy"] = None  # a quarter, by vLLM more than one; no stage trains a detector of objects or listens to sound
    if stage == "eval":
        sys.modules["pandas"] = sys.modules["torchao"] = None  # half a second, by vLLM
    importlib.metadata.packages_distributions = _NamedAlike


class _NamedAlike(dict):
    """Packages by the distributions that have them, as if all were named alike: those that libraries ask for are.

    transformers and trl would look into each distribution there is, which takes them 0.1 s each, or a second where there are many.
    """

    def __missing__(self, package: str) -> list[str]:
        return [package]


def determinism(tree: Path) -> dict[str, str]:
    """docker/determinism.env as a mapping."""
    lines = (tree / "docker" / "determinism.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _hold_to_environment(stage: str) -> None:
    """Refuses an environment that could make other bits, unless `run.unpinned` allows it; the record then says what differs."""
    found = {name: (value, os.environ.get(name, "nothing")) for name, value in determinism(TREE).items()}
    if stage in MAY_ASK_THE_HUB:
        del found["HF_HUB_OFFLINE"]
    other = {name: value for name, (asked, value) in found.items() if value != asked}
    if not other:
        return
    if os.environ.get("MATHMIND_UNPINNED") != "1":
        name, value = next(iter(other.items()))
        raise InputError(f"the environment has {name}={value} where docker/determinism.env has {found[name][0]}, and bits could differ: "
                         "run stages with `dvc repro`, or set run.unpinned to true in params.yaml")  # fmt: skip
    measures.note(unpinned=", ".join(f"{name}={value}" for name, value in other.items()))


def _run(stage: str, paths: dict[str, Path]) -> None:
    _hold_to_environment(stage)
    module = importlib.import_module(f"stages.{section_of(stage)}")
    params = section(PARAMS, read_params(PARAMS), section_of(stage), module.Params)

    scratch = paths.pop("scratch")
    offered = {**paths, "checkpoints": scratch / "checkpoints", "workers": _workers()}
    asked = [name for name, kind in inspect.signature(module.run).parameters.items() if kind.kind == kind.KEYWORD_ONLY]
    if missing := [name for name in asked if name not in offered]:
        raise InputError(f"dvc.yaml gives no --{missing[0]}: the stage's run() asks for it")
    if unknown := [name for name in paths if name not in asked and name != "local_files"]:
        raise InputError(f"dvc.yaml gives --{unknown[0]}, which the stage's run() does not know")
    for name in asked:
        if not name.startswith("out") and name in paths and name != "local_files" and not paths[name].exists():
            raise InputError(f"{paths[name]} is missing: run the stage that writes it, for example with `dvc repro`")

    random.seed(getattr(params, "seed", 0))  # libraries that draw from Python's own generator
    start = time.monotonic()
    module.run(params, **{name: offered[name] for name in asked})
    seconds = time.monotonic() - start
    if not ranks.is_first():
        return

    if absent := [path for name, path in paths.items() if name.startswith("out") and not path.exists()]:
        raise RuntimeError(f"{stage} ended without writing {absent[0]}")
    measures.note_peaks()
    write_json(scratch / RECORD, {
        "seconds": round(seconds, 2),
        **({"processes": ranks.size()} if ranks.size() > 1 else {}),
        "python": platform.python_version(),
        **measures.noted(),
    })  # fmt: skip


def _workers() -> int:
    """As many processes as run.workers says, or as there are cores to run on."""
    return int(os.environ.get("MATHMIND_WORKERS", "0")) or len(os.sched_getaffinity(0))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written; taking torch apart module by module would cost another second and a half
