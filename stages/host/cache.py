"""DVC's cache, and outs whose bytes are not what dvc.lock says.

DVC reads no file again that has kept its size, time and inode, and none of its cache that is read-only. A bit that a disk has
flipped, or a file that a power cut has left short, would go into the next stage, and from the cache back into the tree, unseen.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.host.graph import DVC, GraphStage, hash_of, lock_outs


def outside_a_run() -> dict[str, str]:
    """The caller's environment without the variables of a DVC that runs a stage: a folder's own DVC is then asked."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}


class Cache:
    """Where DVC keeps the files of a repository, by their MD5."""

    def __init__(self, tree: Path) -> None:
        asked = subprocess.run([*DVC, "cache", "dir"], cwd=tree, env=outside_a_run(), capture_output=True, text=True)
        self.tree = tree.resolve()
        self.folder = (tree / (asked.stdout.strip() or ".dvc/cache")).resolve()

    def kept(self, md5: str) -> Path:
        """Where it keeps a file, or the list of a folder's files, if it does."""
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]

    def parts(self, md5: str) -> dict[str, str]:
        """The MD5 of each file of a folder; nothing for a file, or where there is no sound list of it."""
        if not md5.endswith(".dir") or not self.kept(md5).is_file() or self._is_damaged(md5):
            return {}
        return {part["relpath"]: part["md5"] for part in read_json(self.kept(md5))}

    def damaged(self, md5: str) -> list[Path]:
        """The files that it keeps of an out and whose bytes are others than their names say."""
        kept = dict.fromkeys([md5, *self.parts(md5).values()])
        return [self.kept(part) for part in kept if self.kept(part).is_file() and self._is_damaged(part)]

    def mend(self, path: str, md5: str) -> str:
        """What brings an out back, whose bytes in the tree or here are wrong."""
        damaged = [str(file.relative_to(self.tree) if file.is_relative_to(self.tree) else file) for file in self.damaged(md5)]
        here = f" and {', '.join(damaged)}, which DVC's cache holds damaged," if damaged else ""
        return f"remove {path}{here} and run `dvc repro`, which brings it back"

    def _is_damaged(self, md5: str) -> bool:
        return hash_of(self.kept(md5)) != md5.removesuffix(".dir")


def difference(tree: Path, path: str, md5: str, cache: Cache | None = None) -> tuple[str, str] | None:
    """Of an out that is here and not what dvc.lock says: the first such file, and how it is to be mended; None where it is."""
    place = tree / path
    if not place.exists() or (found := hash_of(place)) == md5:
        return None
    cache = cache or Cache(tree)
    odd = [file for file, known in cache.parts(md5).items() if not (place / file).is_file() or hash_of(place / file) != known]
    return f"{path}/{odd[0]}" if odd else path, f"is not what dvc.lock says ({found}, not {md5}): {cache.mend(path, md5)}"


def hold_inputs_to_the_lock(
    tree: Path, stage: GraphStage, graph: Mapping[str, GraphStage], lock: Mapping[str, dict[str, Any]]
) -> None:
    """InputError where a dep that another stage writes is not what it wrote: DVC may not have read it again."""
    written = lock_outs({name: entry for name, entry in lock.items() if name in graph})
    for dep in stage.deps:
        if dep in written and (found := difference(tree, dep, written[dep])):
            raise InputError(" ".join(found))
