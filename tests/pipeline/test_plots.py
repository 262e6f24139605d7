"""`dvc plots`: pages that open without a network, with every training curve and the bar of pass@1."""

import csv
import re

import pytest

from stages.host.plots_page import write_plots_page
from tests.pipeline.test_launcher import clone, dvc  # noqa: F401


@pytest.fixture
def framed(clone):  # noqa: F811
    write_plots_page(clone)
    return clone


def page(folder, *command):
    done = dvc(folder, "plots", *command, "-o", "pages")
    assert done.returncode == 0, done.stderr
    return (folder / "pages" / "index.html").read_text(encoding="utf-8")


def test_a_page_asks_no_server_for_anything(framed):
    shown = page(framed, "show")
    assert "vegaEmbed=" in shown
    assert not re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(?:https?:)?//""", shown)


def test_a_page_shows_each_methods_curve_and_every_models_score(framed):
    shown = page(framed, "show")
    for name in ("training_loss", "reward_of_grpo", "results_plots_pass_at_1_csv"):
        assert re.search(rf"""<div id ?= ?"{name}">\s*<script[^>]*>\s*var spec = {{"\$schema""", shown), name
    with (framed / "results/plots/qlora.csv").open() as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row["loss"]]
    assert all(loss in shown for loss in losses)
    with (framed / "results/plots/pass_at_1.csv").open() as file:
        assert all(row["pass_at_1"] in shown for row in csv.DictReader(file))


def test_a_difference_overlays_two_revisions(framed):
    path = framed / "results/plots/sft.csv"
    path.write_text(re.sub(r"\n(\d+),[^,]+", r"\n\1,9.875", path.read_text(), count=1), encoding="utf-8")
    shown = page(framed, "diff", "HEAD")
    assert "9.875" in shown and '"rev": "workspace"' in shown and '"rev": "HEAD"' in shown
