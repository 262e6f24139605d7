"""What a stage counts while it runs: numbers for the timing record, never for an out."""

import resource
import sys

_measures: dict[str, float | int | str] = {}


def note(**counts: float | int | str) -> None:
    """Adds counts such as tokens=12_345 to this run's record; the last value of a name stays, and of a peak the highest."""
    for name, value in counts.items():
        _measures[name] = max(value, _measures.get(name, value)) if name.startswith("peak_") else value


def note_peaks() -> None:
    """Notes the most memory, in MiB, that this process or one of its children had at once, and of a GPU's, where it used one."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    note(peak_memory_mib=max(own, children) // 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        note(peak_gpu_memory_mib=torch.cuda.max_memory_reserved() // 2**20)


def noted() -> dict[str, float | int | str]:
    """All counts so far."""
    return dict(_measures)
