"""Charts keep within their axes, name round numbers, and take no text for markup."""

import re
from itertools import pairwise

import pytest

from stages.host.charts import Interval, bar, forest, tick_labels, ticks, two_sided
from stages.host.panels import MOST_HOVERS, SMOOTHED_FROM, Series, panel, running_mean
from tests.finished_run import NASTY


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0.467), (0, 0), (3, 3), (-5, -5), (-0.13, 0.1), (-4, 2), (0.002, 0.0031), (20, 7700), (0, 1e-9)],
)
def test_ticks_span_the_figures_in_few_equal_round_steps(low, high):
    at = ticks(low, high)
    steps = {round((b - a) / (at[1] - at[0]), 6) for a, b in pairwise(at)}
    assert at[0] <= low and at[-1] >= high and 2 <= len(at) <= 7 and steps == {1.0}
    assert re.fullmatch(r"[125]\.0+e[-+]\d+", f"{at[1] - at[0]:.6e}")


@pytest.mark.parametrize(
    ("values", "percent", "labels"),
    [
        ([0, 0.2, 0.4], True, ["0%", "20%", "40%"]),
        ([0, 0.005, 0.01], True, ["0.0%", "0.5%", "1.0%"]),
        ([-0.1, 0.0, 0.1], False, ["−0.1", "0.0", "0.1"]),
        ([0, 500, 1000], False, ["0", "500", "1,000"]),
    ],
)
def test_tick_labels_have_the_decimals_that_their_step_needs(values, percent, labels):
    assert tick_labels(values, percent) == labels


def numbers(pattern: str, svg: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, svg)]


def test_a_forest_draws_each_interval_around_its_value_and_tells_it():
    first, last = Interval("a", "hue-0", "full", 0.4, 0.3, 0.5), Interval("b", "", "hollow", 0.9, 0.8, 1.0)
    svg = str(forest([first, Interval("heading"), last], "title", reference=0.4))
    centres = numbers(r'cx="([\d.]+)%"', svg)
    lows, highs = numbers(r'class="interval" x1="([\d.]+)%"', svg), numbers(r'class="interval".*? x2="([\d.]+)%"', svg)
    assert len(centres) == 2 and all(low < at < high < 100 for low, at, high in zip(lows, centres, highs, strict=True))
    assert "<title>a: 40.0%, 95% interval 30.0% to 50.0%</title>" in svg and 'class="reference"' in svg


def test_a_panel_keeps_every_point_inside_its_frame():
    points = [(step, (step % 7) - 3.5) for step in range(5, 500, 5)]
    svg = str(panel([Series("loss", "hue-1", points)], "title", "step"))
    pairs = " ".join(re.findall(r'points="([^"]+)"', svg)).split()
    places = [tuple(map(float, pair.split(","))) for pair in pairs]
    assert len(places) == 2 * len(points), "each step, and the running mean"
    assert all(40 <= x <= 252 and 8 <= y <= 131 for x, y in places)


def test_a_long_curve_tells_its_figures_at_a_bounded_number_of_places():
    svg = str(panel([Series("loss", "", [(step, step) for step in range(5000)])], "title", "step"))
    assert MOST_HOVERS // 2 <= svg.count('class="hover"') <= MOST_HOVERS


def test_a_panel_tells_all_figures_of_a_step_together():
    both = [Series("training", "", [(10, 0.5), (20, 0.25)]), Series("validation", "", [(20, 0.75)])]
    assert "<title>step 20: training 0.25, validation 0.75</title>" in str(panel(both, "loss", "step"))


def test_one_point_is_a_dot():
    assert '<circle class="mark"' in str(panel([Series("loss", "", [(1, 2.0)])], "title", "step"))


def test_the_running_mean_smooths_long_curves_and_leaves_short_ones():
    waves = [(step, float(step % 2)) for step in range(60)]
    smooth = running_mean(waves)
    assert [x for x, _ in smooth] == [x for x, _ in waves]
    assert all(0.3 < y < 0.7 for _, y in smooth[2:-2])
    assert running_mean(waves[: SMOOTHED_FROM - 1]) == []


def test_bars_are_as_long_as_their_share():
    assert 'width="43.60%"' in bar(0.436)
    assert 'x="25.00%" width="25.00%"' in two_sided(-0.1, 0.2)
    assert 'x="50.00%" width="50.00%"' in two_sided(0.2, 0.2)
    assert 'width="0.00%"' in two_sided(0.0, 0.0)


def test_text_in_a_chart_is_never_markup():
    drawn = forest([Interval(NASTY, NASTY, "full", 0.5, 0.4, 0.6, NASTY)], NASTY)
    drawn += panel([Series(NASTY, NASTY, [(0, 1.0), (1, 2.0)], NASTY)], NASTY, NASTY, x_ticks=[(0, NASTY), (1, "b")])
    drawn += bar(0.5, NASTY) + two_sided(0.1, 0.2, NASTY)
    assert "<img" not in drawn and "<script" not in drawn and "&lt;img" in drawn
