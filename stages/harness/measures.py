"""What a stage counts while it runs: numbers for the timing record, never for an out."""

_measures: dict[str, float | int | str] = {}


def note(**counts: float | int | str) -> None:
    """Adds counts such as tokens=12_345 to this run's record; the last value of a name stays."""
    _measures.update(counts)


def noted() -> dict[str, float | int | str]:
    """All counts so far."""
    return dict(_measures)
