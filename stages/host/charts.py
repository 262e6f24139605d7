"""Charts as SVG text, without a plotting library: geometry here, colours and fonts in the page's CSS.

Every function returns Markup: what comes in as text is escaped. A mark's hue is its CSS class. x is in percent, so that
a chart fits a phone as well as a desk with letters of the same size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

LABELS, PLOT = 27.0, 60.0  # of a forest's width, percent: the rows' names, the plot; the rest holds the figures
ROW = 26  # pixels


@dataclass(frozen=True)
class Interval:
    """One row of a forest plot; a row without a value is a heading."""

    label: str
    hue: str = ""
    mark: str = "full"  # full, form (square) or hollow
    value: float | None = None  # this and its bounds in 0..1
    low: float = 0.0
    high: float = 0.0
    note: str = ""  # follows the label under the pointer


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that span low..high, at most `most` + 1 of them, in steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def tick_labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """The ticks as text, all with as many decimals as their step needs."""
    values = [100 * value for value in values] if percent else values
    step = values[1] - values[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") + ("%" if percent else "") for value in values]


def forest(rows: Sequence[Interval], title: str, reference: float | None = None) -> Markup:
    """Values with their intervals, one a row, in 0..1 on a common axis; `reference` draws a line through all rows."""
    at = ticks(0, max(row.high for row in rows))
    bottom = len(rows) * ROW + 6

    def x(value: float) -> str:
        return f"{LABELS + PLOT * value / at[-1]:.2f}%"

    parts = []
    for value, label in zip(at, tick_labels(at, percent=True), strict=True):
        parts.append(line("grid", x(value), 0, x(value), bottom))
        parts.append(text("tick middle", x(value), bottom + 16, label))
    if reference is not None:
        parts.append(line("reference", x(reference), 0, x(reference), bottom))
    for number, row in enumerate(rows):
        y = number * ROW + ROW // 2 + 3
        if row.value is None:
            parts.append(text("heading", "0", y + 4, row.label))
            continue
        shown = f"{100 * row.value:.1f}%"
        told = f"{row.label}{row.note}: {shown}, 95% interval {100 * row.low:.1f}% to {100 * row.high:.1f}%"
        parts.append(Markup('<g class="{} {}"><title>{}</title>').format(row.hue, row.mark, told))
        parts.append(Markup('<rect class="hit" x="0" y="{}" width="100%" height="{}"/>').format(y - ROW // 2, ROW))
        parts.append(text("label", "12" if row.mark == "form" else "0", y + 4, row.label))
        parts.append(line("interval", x(row.low), y, x(row.high), y))
        if row.mark == "form":  # a square is placed by its corner, so it moves by half its side
            square = '<rect class="mark" x="{}" y="{}" width="8" height="8" transform="translate(-4 -4)"/>'
            parts.append(Markup(square).format(x(row.value), y))
        else:
            parts.append(Markup('<circle class="mark" cx="{}" cy="{}" r="5"/>').format(x(row.value), y))
        parts.append(text("figure end", "100%", y + 4, shown) + Markup("</g>"))
    opened = '<svg class="chart forest" role="img" aria-label="{}" width="100%" height="{}">'
    return Markup(opened).format(title, bottom + 22) + Markup("").join(parts) + Markup("</svg>")


def bar(share: float, hue: str = "") -> Markup:
    """A bar of `share` of the width, in 0..1, for a table's cell."""
    svg = '<svg class="bar {}" aria-hidden="true"><rect width="{:.2f}%" height="100%"/></svg>'
    return Markup(svg).format(hue, 100 * share)


def two_sided(value: float, most: float, hue: str = "") -> Markup:
    """A bar from the middle, to the left where the value is below nought; `most` fills one half."""
    half = 50 * abs(value) / most if most else 0
    svg = (
        '<svg class="bar two-sided {}" aria-hidden="true"><rect x="{:.2f}%" width="{:.2f}%" height="100%"/>'
        '<line class="axis" x1="50%" x2="50%" y1="0" y2="100%"/></svg>'
    )
    return Markup(svg).format(hue, 50 - half if value < 0 else 50, half)


def line(css: str, x1: float | str, y1: float, x2: float | str, y2: float) -> Markup:
    """A straight line; x in the chart's units or in percent."""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, x1, y1, x2, y2)


def text(css: str, x: float | str, y: float, words: str) -> Markup:
    """Words at a place, escaped."""
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(css, x, y, words)
