"""`mathmind report`: a run's scores, curves, times and answers as results/report.md, for GitHub, and a page beside it.

results/report.html is one file that asks for nothing else: its style and script stand in it, and its
Content-Security-Policy allows those two by hash, and no request at all.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from stages.host import figures, tables
from stages.host.charts import bar, two_sided
from stages.host.panels import SMOOTHED_FROM
from stages.host.predictions import missing, pack
from stages.host.published import MODEL, PROBLEMS, PUBLISHED, SOURCE
from stages.host.results import ACCOUNTS, Results, is_gguf, model_of, read_results
from stages.host.wording import hundred, number, p_value, percent, points, seconds

PAGE = Path(__file__).parent / "page"
REPORT, REPORT_PAGE = Path("results/report.md"), Path("results/report.html")
PROMPTS = {"own": "its own template"}  # the others have a name that says enough
SHOWS = {"all": "all", "right": "right", "wrong": "wrong", "unparsed": "unparsed", "truncated": "cut off"}
FACTS = {"pinned": "packages as pinned", "level": "bits", "recipe": "image recipe", "unpinned": "environment not as pinned"}


def write_reports(folder: Path) -> list[Path]:
    """Writes both reports of the results in a working folder and returns their paths.

    Raises InputError where results are missing; answers and data that DVC has not brought are only said to be absent.
    """
    results = read_results(folder)
    lock = hashlib.sha256((folder / "dvc.lock").read_bytes()).hexdigest()[:16]
    written = {REPORT: render_markdown(results), REPORT_PAGE: render_page(results, lock)}
    for path, text in written.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return [folder / path for path in written]


def render_markdown(results: Results) -> str:
    """The report as GitHub shows it: tables only."""
    return _rendered("report.md.jinja", results, escape=False)


def render_page(results: Results, lock_digest: str) -> str:
    """The report as one HTML page that works from a file."""
    from markupsafe import Markup

    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return _rendered(
        "report.html.jinja",
        results,
        escape=True,
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        answers=pack(results),
        missing=missing(results),
        forest=figures.scores(results),
        step_panel=figures.by_steps(results),
        curves=figures.curves(results),
        sample_panels=figures.samples(results),
        gguf_panels=figures.gguf(results),
        lock_digest=lock_digest,
    )


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing but this style and this script runs, and nothing is fetched."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _rendered(template: str, results: Results, *, escape: bool, **more: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(PAGE), undefined=StrictUndefined, autoescape=escape)
    environment.globals.update(
        {name: getattr(tables, name) for name in ("counts", "row_counts", "findings")},
        bar=bar, two_sided=two_sided, model_of=model_of,
        number=number, percent=percent, hundred=hundred, points=points, p_value=p_value, seconds=seconds,
    )  # fmt: skip
    gains = {name: row for name, row in results.gains.items() if not is_gguf(name)}
    forms = tables.gguf_forms(results)
    stages = tables.time_by_stage(results)
    tested, cells = tables.matrix(results)
    return environment.get_template(template).render(
        r=results,
        n=results.models["base"]["n"],
        base_model=_base_model(results),
        against_base=tables.against_base(results),
        published=PUBLISHED, published_model=MODEL, published_source=SOURCE, published_n=PROBLEMS,
        tested=tested, cells=cells, seeds=tables.other_seeds(results), seed_pairs=tables.other_seeds_pairs(results),
        gains=gains, most_gain=max((abs(part) for row in gains.values() for part in row["all"].values()), default=0),
        step_counts=tables.step_counts(results),
        forms=forms, gguf_n=max((row["n"] for row in forms), default=0),
        stages=stages,
        most_seconds=max((row["seconds"] for row in stages), default=0),
        most_memory=max((row["peak_memory_mib"] for row in stages), default=0),
        most_gpu_memory=max((row["peak_gpu_memory_mib"] for row in stages), default=0),
        sources=tables.data_sources(results),
        provenance=tables.provenance(results), facts=FACTS,
        absent_accounts=[(stage, path) for stage, path in ACCOUNTS.items() if stage not in results.accounts],
        prompts=PROMPTS, shows=SHOWS.items(), smoothed_from=SMOOTHED_FROM,
        **more,
    )  # fmt: skip


def _base_model(results: Results) -> str:
    """What the base model is, as a clause."""
    how = results.params["base_model"]
    if how["kind"] == "hub":
        return f"the base model is {how['repo']}"
    if how["kind"] == "local":
        return f"the base model is the local folder {how['folder']}"
    record = results.training("base") or {}
    weights = f" of {record['weights']:,} weights" if "weights" in record else ""
    return f"the base model{weights} was pretrained by this run"
