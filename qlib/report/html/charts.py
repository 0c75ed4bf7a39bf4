"""Charts as inline SVG: pure functions of numbers. Their colors are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qlib.report.html.markup import Markup, join, tag
from qlib.report.html.numbers import number
from qlib.report.record_parts import Bars

__all__ = ["Point", "curves", "histogram", "sparkline", "strip"]

_WIDTH, _HEIGHT = 140, 36
_MOST_CODES = 16
_FAR = 1e15  # beyond it, and where a number is none, nothing is drawn


def _svg(width: float, height: float, label: str, *children: Markup, class_: str = "chart") -> Markup:
    return tag("svg", *children, viewbox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_=class_)


def histogram(bars: Bars, low: float | None, high: float | None, scale: float | None, bits: int | None) -> Markup:
    """The counts, on a square root scale, with lines at both ends of a range and at its codes where they are few."""
    counts = bars.counts
    end = bars.low + bars.width * len(counts)
    first, last = min(bars.low, low or 0.0), max(end, high or 0.0)
    across = _WIDTH / ((last - first) or 1.0)
    top = math.sqrt(max(counts, default=0)) or 1.0

    def x(value: float) -> float:
        return round((value - first) * across, 1)

    steps = [f"M{x(bars.low):g} {_HEIGHT}"]
    for index, count in enumerate(counts):
        height = round(_HEIGHT - (_HEIGHT - 2) * math.sqrt(count) / top, 1)
        steps.append(f"V{height:g}H{x(bars.low + bars.width * (index + 1)):g}")
    marks = [tag("path", d="".join([*steps, f"V{_HEIGHT}Z"]), class_="mass")]
    if low is not None and high is not None:
        if scale is not None and bits is not None and 2**bits <= _MOST_CODES:
            codes = [low + scale * code for code in range(2**bits)]
            marks.append(tag("path", d="".join(f"M{x(each):g} {_HEIGHT}v-5" for each in codes), class_="codes"))
        marks.append(tag("path", d=f"M{x(low):g} 0V{_HEIGHT}M{x(high):g} 0V{_HEIGHT}", class_="clip"))
    label = f"values from {number(bars.low)} to {number(end)}"
    if low is not None and high is not None:
        label += f", range {number(low)} to {number(high)}"
    return _svg(_WIDTH, _HEIGHT, label, *marks, class_="small")


def sparkline(values: Sequence[float], label: str) -> Markup:
    """Bars from 0 up, one for each value, without axes."""
    top, step = max(values, default=0.0) or 1.0, _WIDTH / max(len(values), 1)
    path = [
        f"M{step * index:.4g} {_HEIGHT}V{_HEIGHT - (_HEIGHT - 2) * value / top:.4g}h{step:.4g}V{_HEIGHT}"
        for index, value in enumerate(values)
        if math.isfinite(value)
    ]
    return _svg(_WIDTH, _HEIGHT, label, tag("path", d="".join(path), class_="mass"), class_="small")


def strip(rows: Mapping[str, Sequence[float | None]], names: Sequence[str], texts: Sequence[str]) -> Markup:
    """Rows of bars, a column for each layer: of each row the largest value fills its height."""
    step, height = max(4.0, 900 / max(len(names), 1)), 48
    parts = []
    for row, (title, values) in enumerate(rows.items()):
        base = (row + 1) * (height + 22)
        top = max((value for value in values if value is not None and math.isfinite(value)), default=0.0) or 1.0
        parts.append(tag("text", title, x=0, y=base - height - 6, class_="title"))
        path = "".join(
            f"M{step * index:.4g} {base}v{-height * min(max(value, 0.0) / top, 1.0):.3g}h{step - 1:.4g}V{base}"
            for index, value in enumerate(values)
            if value is not None and value > 0
        )
        parts.append(tag("path", d=path, class_=f"mass row{row % 4}"))
    whole = len(rows) * (height + 22)
    over = [
        tag("rect", tag("title", text), x=step * index, y=0, width=step, height=whole, class_="over")
        for index, text in enumerate(texts)
    ]
    label = f"{', '.join(rows)} of {len(names)} layers, in the order of the network"
    return _svg(step * len(names), whole + 4, label, *parts, *over, class_="chart wide")


@dataclass(frozen=True)
class Point:
    """A point of a chart: where it is, what it is called, whether it stands out."""

    x: float
    y: float
    label: str = ""
    marked: bool = False


_Place: TypeAlias = Callable[[Point], tuple[float, float]]


def curves(
    series: Mapping[str, Sequence[Point]], across: str, up: str, *, lines: Collection[str] | None = None
) -> Markup:
    """Points of several series over two axes, joined in all or in `lines`; those that are not finite are left out."""
    width, height, left, bottom = 640.0, 260.0, 62.0, 36.0
    shown = {name: [p for p in points if abs(p.x) < _FAR and abs(p.y) < _FAR] for name, points in series.items()}
    points = [each for found in shown.values() for each in found]
    if not points:
        return tag("p", "nothing to draw")
    (x0, x1), (y0, y1) = (_span([getattr(each, axis) for each in points]) for axis in "xy")

    def place(point: Point) -> tuple[float, float]:
        x = left + (point.x - x0) / (x1 - x0) * (width - left - 12)
        return round(x, 1), round(height - bottom - (point.y - y0) / (y1 - y0) * (height - bottom - 14), 1)

    parts = [_grid(x0, x1, y0, y1, place, height - bottom, left, width)]
    for index, (name, found) in enumerate(shown.items()):
        places = [place(each) for each in found]
        if len(places) > 1 and (lines is None or name in lines):
            path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
            parts.append(tag("path", d=path, class_=f"curve row{index % 4}"))
        parts += [_dot(each, at, name, index, across, up) for each, at in zip(found, places, strict=True)]
    parts.append(tag("text", across, x=(left + width) / 2, y=height - 4, text_anchor="middle", class_="title"))
    parts.append(tag("text", up, x=0, y=10, class_="title"))
    legend = [tag("span", tag("i", class_=f"row{index % 4}"), name) for index, name in enumerate(shown)]
    chart = _svg(width, height, f"{up} over {across}: {', '.join(shown)}", *parts)
    return tag("figure", chart, tag("figcaption", *legend, class_="legend"))


def _dot(point: Point, at: tuple[float, float], name: str, index: int, across: str, up: str) -> Markup:
    text = f"{point.label or name}: {across} {number(point.x)}, {up} {number(point.y)}"
    dot = tag("circle", cx=at[0], cy=at[1], r=5 if point.marked else 3)
    return tag("g", tag("title", text), dot, class_=f"dot row{index % 4}{' marked' * point.marked}")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that holds all values, a little wider.

    >>> _span([0.0, 10.0]), _span([3.0])
    ((-0.4, 10.4), (2.0, 4.0))
    """
    low, high = min(values), max(values)
    if high == low:
        return low - 1.0, high + 1.0
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between two others.

    >>> _ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next((factor for factor in (1, 2, 5) if factor * step >= 0.8 * rough), 10)
    first = math.ceil(low / step)
    return [round(each * step, 12) for each in range(first, first + 12) if each * step <= high * (1 + 1e-12) + 1e-300]


def _grid(x0: float, x1: float, y0: float, y1: float, place: _Place, floor: float, left: float, width: float) -> Markup:
    """Lines and numbers of both axes."""
    parts = []
    for value in _ticks(y0, y1):
        y = place(Point(x0, value))[1]
        parts.append(tag("line", x1=left, x2=width - 12, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", number(value), x=left - 6, y=y + 4, text_anchor="end", class_="tick"))
    for value in _ticks(x0, x1):
        x = place(Point(value, y0))[0]
        parts.append(tag("text", number(value), x=x, y=floor + 16, text_anchor="middle", class_="tick"))
    return join(parts)
