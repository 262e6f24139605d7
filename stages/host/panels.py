"""Small charts of lines over a common x, laid out in rows by the page: training curves, scores by steps, sizes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from stages.host.charts import line, text, tick_labels, ticks

SMALL, LARGE = (260, 165), (360, 250)  # width and height in a panel's own units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 34  # margins
MOST_HOVERS = 80  # places that show their figures under the pointer
SMOOTHED_FROM = 30  # points; a longer series gets a running mean

Scale = Callable[[float], float]  # from a figure to a place in the panel


@dataclass(frozen=True)
class Series:
    """One line of a panel: points (x, y), and at will the interval of each y."""

    label: str
    hue: str
    points: Sequence[tuple[float, float]]
    style: str = ""  # "dashed" sets a second line of the same hue apart
    intervals: Sequence[tuple[float, float]] = ()
    marked: bool = False  # a dot at each point


def panel(
    series: Sequence[Series],
    title: str,
    x_label: str,
    *,
    percent: bool = False,
    low: float | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = SMALL,
) -> Markup:
    """Lines over a common x. The y axis spans the points, and `low` where given; `x_ticks` names places on x.

    `percent` shows fractions in hundredths. Raises ValueError where no series has a point.
    """
    width, height = size
    all_x = [x for one in series for x, _ in one.points]
    all_y = [y for one in series for _, y in one.points] + [y for one in series for both in one.intervals for y in both]
    y_at = ticks(min(all_y) if low is None else min(low, *all_y), max(all_y))
    x_at = [place for place, _ in x_ticks] or ticks(min(all_x), max(all_x))
    x_named = [name for _, name in x_ticks] or tick_labels(x_at)
    # Named places are one apart, and stand clear of the frame.
    x_low, x_high = (x_at[0] - 0.45, x_at[-1] + 0.45) if x_ticks else (min(*all_x, x_at[0]), max(all_x))

    def x(value: float) -> float:
        return round(LEFT + (width - LEFT - RIGHT) * (value - x_low) / ((x_high - x_low) or 1), 1)

    def y(value: float) -> float:
        return round(height - BOTTOM - (height - TOP - BOTTOM) * (value - y_at[0]) / (y_at[-1] - y_at[0]), 1)

    parts = []
    for value, label in zip(y_at, tick_labels(y_at, percent), strict=True):
        parts.append(line("axis" if value == 0 else "grid", LEFT, y(value), width - RIGHT, y(value)))
        parts.append(text("tick end", LEFT - 6, y(value) + 4, label))
    for value, label in zip(x_at, x_named, strict=True):
        if value <= x_high:
            parts.append(text("tick middle", x(value), height - BOTTOM + 15, label))
    parts.append(text("tick end", width - RIGHT, height - 3, x_label))
    for one in series:
        parts.append(_drawn(one, x, y))
    parts.append(_hovers(series, x, size, percent, dict(x_ticks), x_label))
    opened = '<svg class="chart panel" role="img" aria-label="{}" viewBox="0 0 {} {}">'
    return Markup(opened).format(title, width, height) + Markup("").join(parts) + Markup("</svg>")


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each y averaged with its neighbours, a thirtieth of the points to either side; nothing where points are few."""
    if len(points) < SMOOTHED_FROM:
        return []
    reach = len(points) // 30
    means = []
    for place, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, place - reach) : place + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _drawn(one: Series, x: Scale, y: Scale) -> Markup:
    """A series' whiskers, line, running mean and dots."""
    mean = running_mean(one.points)
    whiskers = zip(one.points, one.intervals, strict=True) if one.intervals else ()
    parts = [line("interval", x(at), y(low), x(at), y(high)) for (at, _), (low, high) in whiskers]
    parts.append(_path("line faint" if mean else f"line {one.style}", one.points, x, y))
    if mean:
        parts.append(_path(f"line {one.style}", mean, x, y))
    if one.marked or len(one.points) == 1:
        dot = Markup('<circle class="mark" cx="{}" cy="{}" r="3.5"/>')
        parts += [dot.format(x(at), y(value)) for at, value in one.points]
    return Markup('<g class="{}">').format(one.hue) + Markup("").join(parts) + Markup("</g>")


def _hovers(
    series: Sequence[Series], x: Scale, size: tuple[int, int], percent: bool, names: dict[float, str], x_label: str
) -> Markup:
    """Invisible bands over the plot, each of which tells every figure at its place, a pixel or a named one."""
    told: dict[float, tuple[str, list[str]]] = {}
    for one in series:
        for at, value in one.points:
            shown = f"{100 * value:.1f}%" if percent else f"{value:.4g}".replace("-", "−")
            place = min(names, key=lambda named: abs(named - at)) if names else at
            _, figures = told.setdefault(round(x(place)), (names.get(place, f"{place:g}"), []))
            figures.append(f"{one.label} {shown}")
    middles = sorted(told)[:: max(1, math.ceil(len(told) / MOST_HOVERS))]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), size[0] - RIGHT]
    band = Markup('<rect class="hover" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    return Markup("").join(
        band.format(a, TOP, b - a, size[1] - TOP - BOTTOM, f"{x_label} {told[middle][0]}: {', '.join(told[middle][1])}")
        for middle, (a, b) in zip(middles, pairwise(edges), strict=True)
    )


def _path(css: str, points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(css, " ".join(f"{x(a)},{y(b)}" for a, b in points))
