"""The page's tables: rows made of a run's results, ready to be printed."""

from typing import Any

from stages.host.results import Results, Row, model_of

SIGNIFICANT = 0.05  # of p after Holm's correction
SOME, MUCH = 0.05, 0.15  # differences in pass@1 from which the matrix is coloured more strongly

ORIGINS = {"generator": "made here by the generator", "local": "a local file"}


def against_base(results: Results) -> dict[str, list[str]]:
    """The models tested against the base, by what the test says: "higher", "lower", "within chance"."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "within chance": []}
    for name, pair in results.pairs.items():
        first, _, second = name.partition("_vs_")
        if second == "base":
            found[_verdict(pair)].append(first)
    return found


def matrix(results: Results) -> tuple[list[str], dict[tuple[str, str], Row]]:
    """The models tested, and by (row, column) the row's pass@1 less the column's; every pair stands there both ways."""
    cells: dict[tuple[str, str], Row] = {}
    for name, pair in results.pairs.items():
        first, _, second = name.partition("_vs_")
        turned = {"difference": -pair["difference"], "low": -pair["high"], "high": -pair["low"]}
        for key, cell in (((first, second), pair), ((second, first), {**pair, **turned})):
            size = abs(cell["difference"])
            strength = "much" if size >= MUCH else "some" if size >= SOME else "little"
            cells[key] = {**cell, "verdict": _verdict(cell), "strength": strength}
    return [name for name in results.trained if any(name in pair for pair in cells)], cells


def _verdict(pair: Row) -> str:
    if pair["p_holm"] >= SIGNIFICANT:
        return "within chance"
    return "higher" if pair["difference"] > 0 else "lower"


def step_counts(results: Results) -> list[str]:
    """The numbers of steps that test problems take, in order."""
    return sorted({count for about in results.about.values() for count in about.get("by_steps", {})}, key=int)


def gguf_forms(results: Results) -> list[Row]:
    """One row a model and GGUF form, the largest file first within a model."""
    rows = []
    for name, about in results.about.items():
        forms = sorted(about.get("forms", {}).items(), key=lambda item: -item[1]["mib"])
        for place, (form, row) in enumerate(forms):
            model = name.removesuffix("-gguf")
            rows.append({**row, "model": model, "form": form, "first": place == 0, "forms": len(forms)})
    return rows


def other_seeds(results: Results) -> list[Row]:
    """What another seed of one stage does to the scores: a row a stage and model that any of its runs moved.

    `pass_at_1` holds this run's score first, then the others'; `waiting` counts runs without scores, queued or failed.
    """
    rows = []
    for stage, runs in _seed_runs(results).items():
        ended = [run["models"] for run in runs if run["models"]]
        for model in results.trained:
            scores = [models[model]["pass_at_1"] for models in (results.models, *ended)]
            if len(set(scores)) > 1 or model == model_of(stage):
                waiting = len(runs) - len(ended)
                rows.append({"stage": stage, "model": model, "pass_at_1": scores, "waiting": waiting})
    return rows


def other_seeds_pairs(results: Results) -> list[Row]:
    """What another seed of one stage does to the tests: a row a stage and pair that any of its runs moved.

    `runs` holds this run's pair first, then the others'.
    """
    rows = []
    for stage, others in _seed_runs(results).items():
        ended = [run["pairs"] for run in others if run["pairs"]]
        for name, pair in results.pairs.items():
            runs = [pair, *(pairs[name] for pairs in ended if name in pairs)]
            if any(run["difference"] != pair["difference"] or run["p"] != pair["p"] for run in runs):
                rows.append({"stage": stage, "pair": name, "runs": runs})
    return rows


def _seed_runs(results: Results) -> dict[str, list[Row]]:
    """The runs under other seeds by the stage whose seed it was."""
    stages: dict[str, list[Row]] = {}
    for run in results.seeds.values():
        stages.setdefault(run["stage"], []).append(run)
    return stages


def time_by_stage(results: Results) -> list[Row]:
    """The graph's stages in order: runs, seconds added, the largest peaks in MiB, tokens a second over all runs."""
    stages: dict[str, list[Row]] = {}
    for name, record in results.timing.items():
        stages.setdefault(name.partition("@")[0], []).append(record)
    return [
        {
            "stage": stage,
            "runs": len(records),
            "seconds": sum(record["seconds"] for record in records),
            "peak_memory_mib": max(record["peak_memory_mib"] for record in records),
            "peak_gpu_memory_mib": max(record.get("peak_gpu_memory_mib", 0) for record in records),
            "tokens_per_second": sum(record.get("tokens", 0) for record in records)
            / max(sum(record["seconds"] for record in records), 0.01),
        }
        for stage, records in stages.items()
    ]


def data_sources(results: Results) -> list[Row]:
    """What the models read, by name: where it is from, rows, licence, whether its terms must be accepted first."""
    known = {**results.sources, **({"base model": results.base_source} if results.base_source else {})}
    return [
        {
            "name": name,
            "origin": f"{source['repo']} at {source['revision'][:12]}" if source.get("repo") else ORIGINS[source["kind"]],
            "rows": source.get("rows"),
            "license": source.get("license_name") or source.get("license") or "",
            "gated": bool(source.get("gated")),
        }
        for name, source in known.items()
    ]


def row_counts(account: Row) -> list[Row]:
    """An account's sets: rows read, dropped, kept, and in training and validation; None where a set has no such number."""
    return [
        {
            "set": name,
            "read": entry.get("read", entry.get("rows")),
            "dropped": sum(finding["dropped"] for finding in entry["findings"].values()) if "findings" in entry else None,
            **{number: entry.get(number) for number in ("kept", "train", "validation")},
        }
        for name, entry in account.items()
    ]


def findings(account: Row) -> list[Row]:
    """What an account's checks found: set, reason, rows, dropped, and examples with id, text and the row that they are like."""
    return [
        {
            "set": name,
            "reason": reason,
            "rows": finding["rows"],
            "dropped": finding["dropped"],
            "examples": [{**example, "like": finding["like"].get(example["id"])} for example in finding["examples"]],
        }
        for name, entry in account.items()
        for reason, finding in entry.get("findings", {}).items()
    ]


def provenance(results: Results) -> dict[str, dict[str, list[str]]]:
    """What the timing records say of how stages ran, by fact and value: the stages of which it holds.

    What a record says in words is of the making; what it counts, in numbers, is not. Nested facts are `machine, cpu`.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for stage, record in results.timing.items():
        for fact, value in _facts(record):
            found.setdefault(fact, {}).setdefault(value, []).append(stage)
    return found


def _facts(record: Row, above: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for name, value in record.items():
        if above == "" and name in ("stage", "key"):
            continue
        if isinstance(value, dict):
            facts += _facts(value, f"{above}{name}, ")
        elif isinstance(value, bool):
            facts.append((above + name, "yes" if value else "NO"))
        elif isinstance(value, (str, list)):
            facts.append((above + name.replace("_", " "), value if isinstance(value, str) else _joined(value)))
    return facts


def _joined(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def counts(record: Row) -> str:
    """What a stage counted besides time and memory, in words."""
    shown = ("seconds", "peak_memory_mib", "peak_gpu_memory_mib", "tokens_per_second")
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}"
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in shown
    )
