"""The page of a comparison of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qlib.report.comparison import Side, different_layers, different_settings, front, pairs
from qlib.report.html.charts import Point, curves
from qlib.report.html.markup import Markup, join, tag
from qlib.report.html.numbers import count, number, percent, seconds, size
from qlib.report.html.page import Part, page
from qlib.report.html.tables import Row, figure_cell, table

__all__ = ["comparison_page"]

_COSTS: Mapping[str, Callable[[Side], float]] = {
    "bytes of weights": lambda side: side.bytes,
    "multiply-accumulates": lambda side: side.macs,
}


def comparison_page(runs: Sequence[Side]) -> str:
    """The page of runs that looked at the same images."""
    tested = runs[0].tested
    below = f"{len(tested.labels):,} images, hash {tested.images}"
    parts: list[Part] = [
        ("pareto", "Accuracy against cost", _charts(runs)),
        ("pairs", "Every two of them", _pairs(runs)),
    ]
    for place, title, rows in (
        ("settings", "Settings that differ", different_settings(runs)),
        ("layers-differ", "Layers that differ", different_layers(runs)),
    ):
        if rows:
            heads = ("Name", *(each.name for each in runs))
            cells = [(name, *texts) for name, texts in rows.items()]
            parts.append((place, title, table(heads, cells, f"{title}, by run", id_=f"{place}-table")))
    return page(f"Comparison of {len(runs)} runs", below, _results(runs), parts)


def _results(runs: Sequence[Side]) -> Markup:
    rows: list[Row] = []
    for each in runs:
        result, exact = each.result, each.report.verification
        rows.append(
            (
                each.name,
                f"{each.report.origin.arch}, {result.model}",
                figure_cell(result.top1, f"{result.top1:.2f}"),
                f"{result.low:.2f} to {result.high:.2f}",
                figure_cell(result.loss),
                figure_cell(each.agreement, "" if each.agreement is None else f"{each.agreement:.2f}"),
                figure_cell(each.bytes, size(each.bytes) if each.bytes else ""),
                figure_cell(each.macs, count(each.macs) if each.macs else ""),
                figure_cell(each.in_integers, "" if each.in_integers is None else percent(each.in_integers)),
                "" if exact is None else "exact" if exact.exact else "NOT exact",
                figure_cell(each.report.origin.seconds, seconds(each.report.origin.seconds)),
            )
        )
    heads = (
        *("Run", "Model", "Top1 %", "95 % interval", "Loss", "As FP32, %", "Weights", "MACs", "In integers"),
        *("Exported file", "Took"),
    )
    return table(heads, rows, "All runs, on the same images", id_="runs")


def _charts(runs: Sequence[Side]) -> Markup:
    """Top1 over each cost that differs, with the runs that no other one beats in both."""
    drawn = []
    for title, cost in _COSTS.items():
        costs, gains = [cost(each) for each in runs], [each.result.top1 for each in runs]
        if len({each for each in costs if each}) < 2:
            continue
        best = front(costs, gains)
        points = [Point(x, y, each.name, index in best) for index, (x, y, each) in
                  enumerate(zip(costs, gains, runs, strict=True))]  # fmt: skip
        series = {"runs": points, "Pareto front": [points[index] for index in best]}
        drawn.append(curves(series, title, "Top1, %", lines=("Pareto front",)))
        drawn.append(tag("p", "Best at their cost: ", ", ".join(runs[index].name for index in best)))
    return join(drawn) if drawn else tag("p", "All runs cost the same weights and multiply-accumulates.")


def _pairs(runs: Sequence[Side]) -> Markup:
    rows: list[Row] = [
        (
            f"{each.first} against {each.second}",
            *(figure_cell(value, f"{value:.2f}") for value in (each.agreement, each.low, each.high)),
            figure_cell(each.lost, count(each.lost)),
            figure_cell(each.won, count(each.won)),
            figure_cell(each.p_value, number(each.p_value, 3)),
        )
        for each in pairs(runs)
    ]
    heads = ("Runs", "Agreement %", "95 % from", "to", "Right only in the first", "only in the second", "McNemar p")
    return table(heads, rows, "Predictions, image by image", id_="two")
