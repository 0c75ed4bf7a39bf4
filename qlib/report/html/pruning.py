"""Pruning on a run's page: what was kept, and what each weight alone can lose."""

from __future__ import annotations

from qlib.report.html.charts import Point, curves
from qlib.report.html.markup import Markup, join
from qlib.report.html.numbers import count
from qlib.report.html.tables import Row, figure_cell, table
from qlib.report.record import RunReport

__all__ = ["pruned_section", "pruning_sensitivity_section"]


def pruned_section(report: RunReport) -> Markup | None:
    """What pruning kept of each weight, or of channels that live and die together."""
    if not report.pruned:
        return None
    rows: list[Row] = [
        (each.name, figure_cell(each.layers), figure_cell(each.kept, count(each.kept)),
         figure_cell(each.total, count(each.total)), figure_cell(100 * each.kept / each.total),
         figure_cell(None if each.error is None else 100 * each.error))
        for each in report.pruned
    ]  # fmt: skip
    kept, total = (sum(getattr(each, name) for each in report.pruned) for name in ("kept", "total"))
    heads = ("Name", "Layers", "Kept", "Total", "Kept %", "Error %")
    return table(heads, rows, f"{count(kept)} of {count(total)} are kept", id_="pruned")


def pruning_sensitivity_section(report: RunReport) -> Markup | None:
    """Top1 without a share of one weight, and the table behind the curves."""
    found = report.pruning_sensitivity
    if not found:
        return None
    series = {
        name: [Point(each.sparsity, each.top1, name) for each in found if each.parameter == name]
        for name in dict.fromkeys(each.parameter for each in found)
    }
    rows: list[Row] = [
        (each.parameter, figure_cell(each.sparsity), figure_cell(each.top1), figure_cell(each.top5),
         figure_cell(each.loss))
        for each in found
    ]  # fmt: skip
    heads = ("Parameter", "Sparsity", "Top1", "Top5", "Loss")
    return join([curves(series, "sparsity", "Top1"), table(heads, rows, "Each weight alone", id_="pruning")])
