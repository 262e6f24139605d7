"""Checkpoints that can be trusted after a kill: each is sealed with the hashes of its files once all of them are written."""

import hashlib
import shutil
from itertools import takewhile
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json

SEAL = "sha256.json"  # of every file of the checkpoint beside it


def sealer():
    """A trainer callback that seals each checkpoint as soon as the trainer has written it."""
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):
        def on_save(self, args, state, control, **_):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / SEAL, _hashes(folder))

    return Sealer()


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
