"""How two versions of an out differ: which file, and in it which tensor, JSON key, row or byte, and how far.

Numbers are compared with numbers, so that what another processor rounds in its own way can be told from what is another result.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

CHUNK = 2**22  # numbers compared at a time, so that a large tensor needs little memory
SHOWN = 60  # characters of a value


Tensors = tuple[Any, dict[str, Callable[[], Any]]]  # what a file says beside its tensors, and those by name, each read when asked for


@dataclass(frozen=True)
class Difference:
    """One file that differs. `far` is the largest relative distance of its numbers, or infinity where more than numbers differ."""

    file: str
    how: str
    far: float


def differences(known: Mapping[str, Path], found: Mapping[str, Path]) -> list[Difference]:
    """Every file that is not the same in both, in the order of their names."""
    listed = []
    for name in sorted({*known, *found}):
        if name not in found:
            listed.append(Difference(name, "is missing", math.inf))
        elif name not in known:
            listed.append(Difference(name, "is new", math.inf))
        elif not _same_bytes(known[name], found[name]):
            listed.append(_of_files(name, known[name], found[name]))
    return listed


def _of_files(name: str, known: Path, found: Path) -> Difference:
    """How two files of different bytes differ, as far as their kind says; else the first byte."""
    kind = READERS.get(Path(name).suffix)  # DVC's cache names files by their hash
    try:
        how = kind(known, found) if kind else None
    except (ValueError, KeyError, IndexError) as error:  # one of them is no longer a file of its kind
        return Difference(name, f"cannot be read ({error}); {_first_byte(known, found)}", math.inf)
    return Difference(name, *how) if how else Difference(name, _first_byte(known, found), math.inf)


def _of_tensors(read: Callable[[Path], Tensors], known: Path, found: Path) -> tuple[str, float] | None:
    """The first tensor that differs, how many do, and the largest distance of any."""
    (about, ours), (about_found, theirs) = read(known), read(found)
    if about != about_found:
        return first_value(about, about_found)
    if list(ours) != list(theirs):
        odd = next(a or b for a, b in zip_longest(ours, theirs) if a != b)
        return f"has other tensors, {odd} the first", math.inf
    far = {name: _distance(ours[name](), theirs[name]()) for name in ours}
    moved = {name: distance for name, distance in far.items() if distance > 0}
    if not moved:
        return None
    first, furthest = next(iter(moved)), max(moved, key=moved.__getitem__)
    how = f"tensor {first} differs by {moved[first]:.1e} of its norm"
    if len(moved) > 1:
        how += f", {len(moved)} of {len(far)} tensors do, {furthest} the most ({moved[furthest]:.1e})"
    return how, moved[furthest]


def _distance(ours: Any, theirs: Any) -> float:
    """‖a - b‖ / ‖a‖ of two arrays, in 64 bits; infinity where shape or type differ, or one holds what is no number."""
    import numpy as np

    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    a, b = ours.reshape(-1), theirs.reshape(-1)
    parts = [slice(start, start + CHUNK) for start in range(0, a.size, CHUNK)]
    if all(a[part].tobytes() == b[part].tobytes() for part in parts):
        return 0.0
    apart = sum(float(np.square(_numbers(a[part]) - _numbers(b[part])).sum()) for part in parts)
    size = sum(float(np.square(_numbers(a[part])).sum()) for part in parts)
    far = math.sqrt(apart / size) if size else math.inf
    return math.inf if math.isnan(far) else far


def _numbers(array: Any) -> Any:
    """In 64 bits; 16-bit words stand for bfloat16, which numpy does not know."""
    import numpy as np

    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _safetensors(path: Path) -> Tensors:
    """Tensors mapped and not read; bfloat16 as 16-bit words (safetensors, "Format")."""
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
             "U8": "u1", "BOOL": "?"}  # fmt: skip
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    words = np.memmap(path, mode="r", dtype=np.uint8, offset=8 + length)
    about = header.pop("__metadata__", None)

    def of(tensor: dict[str, Any]) -> Any:
        return words[slice(*tensor["data_offsets"])].view(kinds[tensor["dtype"]]).reshape(tensor["shape"])

    return about, {name: partial(of, tensor) for name, tensor in header.items()}


def _gguf(path: Path) -> Tensors:
    """Tensors mapped and not read; a quantised one as the numbers that it stands for."""
    import gguf

    reader = gguf.GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items()}
    return about, {tensor.name: partial(gguf.dequantize, tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def _of_json(known: Path, found: Path) -> tuple[str, float] | None:
    return first_value(*(json.loads(path.read_text(encoding="utf-8")) for path in (known, found)))


def _of_rows(read: Callable[[Path], list[Any]], known: Path, found: Path) -> tuple[str, float] | None:
    """The first row that differs, how many do, and how far."""
    ours, theirs = read(known), read(found)
    apart = {number: (a, b) for number, (a, b) in enumerate(zip_longest(ours, theirs), 1) if a != b}
    if not apart:
        return None
    number, (a, b) = next(iter(apart.items()))
    far = max(max((step for _, _, _, step in _apart(a, b)), default=math.inf) for a, b in apart.values())
    label = f" ({a['id']})" if isinstance(a, dict) and "id" in a else ""
    how = f"row {number}{label}: {first_value(a, b)[0]}" if a is not None and b is not None else f"row {number} is in one alone"
    return (f"{how}; {len(apart)} of {max(len(ours), len(theirs))} rows differ" if len(apart) > 1 else how), far


def _json_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _csv_rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str | None) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def first_value(known: Any, found: Any) -> tuple[str, float] | None:
    """The first place where two nested values differ, how many there are, and the largest relative distance of numbers."""
    apart = list(_apart(known, found))
    if not apart:
        return None
    place, a, b, _ = apart[0]
    how = f"{place or 'the value'} is {_shown(b)}, not {_shown(a)}"
    return how + (f" ({len(apart)} values differ)" if len(apart) > 1 else ""), max(far for *_, far in apart)


def _apart(known: Any, found: Any, place: str = "") -> Iterator[tuple[str, Any, Any, float]]:
    """Place, both values and their relative distance, of every leaf that differs."""
    if isinstance(known, dict) and isinstance(found, dict):
        for key in [*known, *(key for key in found if key not in known)]:
            yield from _apart(known.get(key, ...), found.get(key, ...), f"{place}.{key}" if place else str(key))
    elif isinstance(known, list) and isinstance(found, list):
        for number, (a, b) in enumerate(zip_longest(known, found, fillvalue=...)):
            yield from _apart(a, b, f"{place}[{number}]")
    elif known != found or type(known) is not type(found):
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (known, found))
        yield place, known, found, abs(found - known) / abs(known) if numbers and known else math.inf


def _shown(value: Any) -> str:
    if value is ...:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _same_bytes(known: Path, found: Path) -> bool:
    return known.stat().st_size == found.stat().st_size and _first_apart(known, found) is None


def _first_apart(known: Path, found: Path) -> int | None:
    """The offset of the first byte that is not the same in both."""
    with known.open("rb") as a, found.open("rb") as b:
        offset = 0
        while True:
            ours, theirs = a.read(2**20), b.read(2**20)
            if ours != theirs:
                return offset + next((i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y), min(len(ours), len(theirs)))
            if not ours:
                return None
            offset += len(ours)


def _first_byte(known: Path, found: Path) -> str:
    sizes = [path.stat().st_size for path in (known, found)]
    where = f"byte {_first_apart(known, found):,} is the first that differs"
    return where if sizes[0] == sizes[1] else f"{where}; it has {sizes[1]:,} bytes, not {sizes[0]:,}"


READERS: dict[str, Callable[[Path, Path], tuple[str, float] | None]] = {
    ".safetensors": lambda known, found: _of_tensors(_safetensors, known, found),
    ".gguf": lambda known, found: _of_tensors(_gguf, known, found),
    ".json": _of_json,
    ".jsonl": lambda known, found: _of_rows(_json_rows, known, found),
    ".csv": lambda known, found: _of_rows(_csv_rows, known, found),
}
