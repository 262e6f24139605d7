"""Which chart shows which result. How charts are drawn is in charts.py and panels.py."""

from dataclasses import dataclass, field

from markupsafe import Markup

from stages.host.charts import Interval, forest
from stages.host.panels import LARGE, Series, panel
from stages.host.published import PUBLISHED
from stages.host.results import Results, Row, is_gguf, stage_of
from stages.host.tables import gguf_forms, step_counts
from stages.scoring.statistics import wilson


@dataclass(frozen=True)
class Panel:
    """One small chart with its title; `keys` names its lines where there are several."""

    title: str
    hue: str
    svg: Markup
    keys: list[Series] = field(default_factory=list)


def scores(results: Results) -> Markup:
    """pass@1 of every model, its GGUF form below it, then the report's own figures, hollow."""
    rows = []
    for name, row in results.models.items():
        form = results.about[name].get("form", "")
        label, note = (f"{form}, GGUF", f", {name.removesuffix('-gguf')}") if is_gguf(name) else (name, "")
        bounds = row["pass_at_1"], row["pass_at_1_low"], row["pass_at_1_high"]
        rows.append(Interval(label, results.hue(name), "form" if is_gguf(name) else "full", *bounds, note))
    rows.append(Interval("in the report"))
    for name, theirs in PUBLISHED.items():
        hue = results.hue(name) if name in results.trained else ""
        rows.append(Interval(theirs.title, hue, "hollow", theirs.pass_at_1, *theirs.interval, " in the report"))
    return forest(rows, "pass@1 with 95% intervals", results.models["base"]["pass_at_1"])


def by_steps(results: Results) -> Panel:
    """pass@1 over the number of steps, a line a model, set beside each other so that intervals can be told apart."""
    places = {count: place for place, count in enumerate(step_counts(results))}
    shown = [name for name in results.trained if "by_steps" in results.about[name]]
    series = []
    for number, name in enumerate(shown):
        groups = results.about[name]["by_steps"]
        aside = (number - (len(shown) - 1) / 2) * 0.07
        points = [(places[count] + aside, groups[count]["pass_at_1"]) for count in places if count in groups]
        sizes = [(groups[count]["n"], groups[count]["pass_at_1"]) for count in places if count in groups]
        intervals = [wilson(round(n * share), n) for n, share in sizes]
        series.append(Series(name, results.hue(name), points, intervals=intervals, marked=True))
    named = [(place, count) for count, place in places.items()]
    svg = panel(series, "pass@1 by number of steps", "steps", percent=True, low=0, x_ticks=named, size=LARGE)
    return Panel("pass@1 by number of steps", "", svg, series)


def samples(results: Results) -> list[Panel]:
    """Of several answers drawn to each problem: is one of k right, and is the one that most agree on."""
    found = {name: about["samples"] for name, about in results.about.items() if "samples" in about}
    panels = []
    for title, figure in (("one of k right: pass@k", "pass_at_k"), ("majority of k right: maj@k", "maj_at_k")):
        series = []
        for name, drawn in found.items():
            points = list(enumerate(drawn[figure].values()))
            series.append(Series(name, results.hue(name), points, marked=True))
        if series:
            named = list(enumerate(next(iter(found.values()))[figure]))
            panels.append(Panel(title, "", panel(series, title, "k", percent=True, low=0, x_ticks=named), series))
    return panels


def gguf(results: Results) -> list[Panel]:
    """A file's size against its score and against how often its text is that of the merged model."""
    rows, panels = gguf_forms(results), []
    for title, figure in (("pass@1", "pass_at_1"), ("same text as the merged model", "same_text")):
        series = [
            Series(name, results.hue(name), [(r["mib"], r[figure]) for r in rows if r["model"] == name], marked=True)
            for name in dict.fromkeys(row["model"] for row in rows)
        ]
        if series:
            panels.append(Panel(title, "", panel(series, title, "MiB", percent=True, low=0), series))
    return panels


def curves(results: Results) -> list[tuple[str, str, list[Panel]]]:
    """Headed groups of panels, of what the curves hold: an absent column is no panel, an empty group no group."""
    stages = {stage_of(name): rows for name in results.trained if (rows := results.curves.get(stage_of(name)))}
    rewarded = {stage: rows for stage, rows in stages.items() if "reward" in rows[0]}
    parts = [name for rows in rewarded.values() for name in rows[0] if name.startswith("rewards.")]
    parts = [name for name in dict.fromkeys(parts) if name.endswith(".mean") and name != DISTINCT]
    groups = (
        ("Loss", "A policy's loss, as GRPO's, says little of progress: its reward does.",
         [_panels(results, stages, "loss", {"loss": "training", "eval_loss": "validation"})]),
        ("Reward", "The mean over a step's completions: the whole, then each part of it.",
         [_panels(results, rewarded, "reward", {"reward": "reward"}),
          *(_panels(results, rewarded, _part(name), {name: _part(name)}) for name in parts)]),
        ("Groups and completions", "A group whose completions all earn the same reward teaches nothing.",
         [_panels(results, rewarded, title, columns, **how) for title, columns, how in _COMPLETIONS]),
        ("Preferences", "How often, and by how much, the chosen answer is more likely than the rejected one.",
         [_panels(results, stages, title, columns, **how) for title, columns, how in _PREFERENCES]),
    )  # fmt: skip
    found = [(title, note, sum(panels, [])) for title, note, panels in groups]
    return [(title, note, panels) for title, note, panels in found if panels]


DISTINCT = "rewards.distinct.mean"  # measured by grpo as a reward of weight 0
_SHARE = {"percent": True, "low": 0.0}
_COMPLETIONS = (
    ("groups with one reward", {"frac_reward_zero_std": "share"}, _SHARE),
    ("cut at the limit", {"completions.clipped_ratio": "share"}, _SHARE),
    ("distinct completions of a prompt", {DISTINCT: "share"}, _SHARE),
    ("length, tokens", {"completions.mean_length": "all", "completions.mean_terminated_length": "not cut off"}, {}),
    ("entropy", {"entropy": "entropy"}, {"low": 0.0}),
    ("divergence from the start (KL)", {"kl": "KL"}, {"low": 0.0}),
)
_PREFERENCES = (
    ("chosen above rejected", {"rewards.accuracies": "share"}, _SHARE),
    ("margin", {"rewards.margins": "margin"}, {"low": 0.0}),
)


def _part(column: str) -> str:
    """A reward's name: rewards.match_format_exactly.mean is the reward "match format exactly"."""
    return column.removeprefix("rewards.").removesuffix(".mean").replace("_", " ")


def _panels(results: Results, stages: dict[str, list[Row]], title: str, columns: dict[str, str], **how) -> list[Panel]:
    """The panel of these columns for each stage that logged the first of them."""
    models = {stage_of(name): name for name in results.trained}
    panels = []
    for stage, rows in stages.items():
        hue, series = results.hue(models[stage]), []
        for column, label in columns.items():
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                series.append(Series(label, hue, points, "dashed" if series else ""))
        if series and any(next(iter(columns)) in row for row in rows):
            name = f"{stage}, {title}"
            panels.append(Panel(name, hue, panel(series, name, "step", **how), series if len(series) > 1 else []))
    return panels
