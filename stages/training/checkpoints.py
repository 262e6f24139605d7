"""Checkpoints that can be trusted after a kill: each is sealed with the hashes of its files once all of them are written."""

import hashlib
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

from stages.harness import ranks
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json

SEAL = "sha256.json"  # of every file of the checkpoint beside it
WEIGHTS, OPTIMIZER, TOLD = "model.safetensors", "optimizer.safetensors", "told.json"


def sealer():
    """A trainer callback that seals each checkpoint as soon as the trainer has written it.

    grpo's trainer also saves its reference, an adapter in a folder below, which it makes anew from the same start each time. It is
    taken away: transformers reads nothing but such folders where it finds one, and a resumed run would go on from its start.
    """
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):
        def on_save(self, args, state, control, **_):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for reference in folder.glob("*/adapter_config.json"):
                shutil.rmtree(reference.parent)
            _bring_together(folder)
            if ranks.is_first():
                _seal(folder)

    return Sealer()


def save(checkpoints: Path, step: int, model, optimizer, told: dict[str, Any]) -> None:
    """Writes and seals the checkpoint of a loop of our own, and removes those before it.

    `told` is what else the loop goes on from, as JSON, whose numbers come back to the last bit.
    """
    from safetensors.torch import save_file, save_model

    folder = checkpoints / f"checkpoint-{step}"
    folder.mkdir()
    save_model(model, str(folder / WEIGHTS))
    state = optimizer.state_dict()["state"]
    save_file({f"{place}.{name}": value for place, part in state.items() for name, value in part.items()}, folder / OPTIMIZER)
    write_json(folder / TOLD, told)
    _seal(folder)
    for other in checkpoints.glob("checkpoint-*"):
        if other != folder:
            shutil.rmtree(other)


def load(folder: Path, model, optimizer) -> dict[str, Any]:
    """Brings model and optimizer back to where `save` found them and returns what was told."""
    from safetensors.torch import load_file, load_model

    load_model(model, folder / WEIGHTS)
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(folder / OPTIMIZER).items():
        place, name = key.split(".")
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return read_json(folder / TOLD)


def last_whole_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that is as it was written, or None.

    One that is not, because a kill came between or its disk lost something, is removed, and with it those after it, which may
    name it as the best so far.
    """
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = list(takewhile(_is_whole, folders))
    for folder in folders[len(whole) :]:
        print(f"{folder.name} is not as it was written: it is left out", flush=True)
        shutil.rmtree(folder)
    return str(whole[-1]) if whole else None


def where_all_go_on(checkpoints: Path) -> str | None:
    """The first process's last whole checkpoint, for all of them; machines without it are sent its files."""
    found = last_whole_checkpoint(checkpoints) if ranks.is_first() else None
    if not ranks.of_several_machines():
        return ranks.told(found)
    files = {path.name: path.read_bytes() for path in Path(found).iterdir()} if found else {}
    name, files = ranks.told((Path(found).name if found else None, files))
    if ranks.local_rank() == 0 and not ranks.is_first():
        for other in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(other)
        if name:
            (checkpoints / name).mkdir()
        for file, content in files.items():
            (checkpoints / name / file).write_bytes(content)
    ranks.everybody(None)  # none goes on before the files are there
    return str(checkpoints / name) if name else None


def _bring_together(folder: Path) -> None:
    """Brings to the first process what each other one has of a checkpoint: the state of its generators, wherever it lies."""
    if ranks.size() == 1:
        return
    own = folder / f"rng_state_{ranks.rank()}.pth"
    for rank, state in enumerate(ranks.everybody(own.read_bytes())):
        if ranks.is_first():
            (folder / f"rng_state_{rank}.pth").write_bytes(state)


def _seal(folder: Path) -> None:
    write_json(folder / SEAL, _hashes(folder))


def _is_whole(folder: Path) -> bool:
    try:
        return read_json(folder / SEAL) == _hashes(folder)
    except (InputError, OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
