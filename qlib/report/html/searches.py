"""Searches, training, verification and origin of a run on its page."""

from __future__ import annotations

from collections.abc import Sequence

from qlib.report.html.charts import Point, curves
from qlib.report.html.markup import Markup, join, tag
from qlib.report.html.numbers import count, number, seconds, size
from qlib.report.html.tables import Row, figure_cell, table
from qlib.report.record import RunReport
from qlib.report.record_parts import Epoch, TradeOffPoint

__all__ = ["auto_section", "origin_section", "results_section", "tradeoff_section", "training_section"]
__all__ += ["verification_section"]


def results_section(report: RunReport) -> Markup | None:
    """All models and all comparisons, in full."""
    if not report.results:
        return None
    rows: list[Row] = [
        (each.model, *(figure_cell(value, f"{value:.3f}") for value in (each.top1, each.low, each.high, each.top5)),
         figure_cell(each.loss, f"{each.loss:.5f}"), figure_cell(each.samples, count(each.samples)))
        for each in report.results
    ]  # fmt: skip
    heads = ("Model", "Top1 %", "95 % from", "to", "Top5 %", "Loss", "Images")
    parts = [table(heads, rows, "Results on the test images")]
    if report.versus:
        compared: list[Row] = [
            (f"{each.model} against {each.other}",
             *(figure_cell(value, f"{value:.2f}") for value in (each.agreement, each.low, each.high)),
             figure_cell(each.lost), figure_cell(each.won), figure_cell(each.p_value, number(each.p_value, 3)))
            for each in report.versus
        ]  # fmt: skip
        heads = ("Models", "Agreement %", "95 % from", "to", "Lost", "Won", "McNemar p")
        parts.append(table(heads, compared, "Predictions, image by image"))
    return join(parts)


def tradeoff_section(report: RunReport) -> Markup | None:
    """The curve of a search under a budget, with the point that was chosen."""
    found = report.tradeoff
    if found is None:
        return None

    def points(each: Sequence[TradeOffPoint], marked: bool) -> list[Point]:
        return [Point(point.cost_units, point.loss, point.cost, marked) for point in each]

    series = {"best under a budget": points(found.curve, False), "chosen": points((found.chosen,), True)}
    rows: list[Row] = [
        (
            each.budget,
            each.cost,
            *(figure_cell(value) for value in (each.loss, each.bits_weights, each.bits_activations)),
        )
        for each in (*found.curve, found.chosen)
    ]
    heads = ("Budget", "Used", "Expected loss", "Mean bits of weights", "of activations")
    told = f"The budget was {found.budget}; what is chosen uses {found.chosen.cost}."
    what = "operations of bits" if found.unit == "BOPs" else "bits of weights"
    drawn = curves(series, f"cost, {what}", "expected increase of the loss")
    return join([tag("p", told), drawn, table(heads, rows, "Trade-off", best=len(rows) - 1)])


def auto_section(report: RunReport) -> Markup | None:
    """The settings that `--auto` tried."""
    found = report.auto
    if found is None:
        return None
    rows: list[Row] = [
        (each.rung, each.settings or "as asked", figure_cell(each.agreement, f"{each.agreement:.2f}"),
         figure_cell(each.drop, f"{each.drop:.2f}"), figure_cell(each.divergence), figure_cell(each.seconds))
        for each in found.trials
    ]  # fmt: skip
    heads = ("Tried", "Settings", "Agreement %", "Top1 drop", "Divergence", "Seconds")
    points = {"settings": [Point(each.seconds, each.agreement, each.rung, index == found.best)
                           for index, each in enumerate(found.trials)]}  # fmt: skip
    drawn = curves(points, "seconds", "agreement with FP32, %", lines=())
    return join([table(heads, rows, f"Target {found.target}", best=found.best), drawn])


def training_section(report: RunReport) -> Markup | None:
    """Curves of what each epoch measured, those of one kind over the same axis, and the schedule."""
    found = report.training
    if found is None or not found.epochs:
        return None
    names = list(dict.fromkeys(name for each in found.epochs for name in each.metrics))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split()[-1].lower(), []).append(name)
    drawn = [
        join([tag("h3", kind), curves({name: _course(found.epochs, name) for name in members}, "epoch", kind)])
        for kind, members in kinds.items()
    ]
    schedule = [tag("h3", "Schedule"), tag("pre", found.schedule, tabindex=0)] if found.schedule else []
    return join([*schedule, *drawn])


def _course(epochs: Sequence[Epoch], name: str) -> list[Point]:
    return [Point(each.epoch, each.metrics[name]) for each in epochs if name in each.metrics]


def verification_section(report: RunReport) -> Markup | None:
    """Each tensor of the exported file beside the simulation."""
    found = report.verification
    if found is None:
        return None
    rows: list[Row] = [
        (each.layer, each.kernel, "integer" if each.integer else "float", figure_cell(each.codes, count(each.codes)),
         figure_cell(each.differing, count(each.differing)), figure_cell(each.largest, count(each.largest)),
         each.verdict)
        for each in found.layers
    ]  # fmt: skip
    heads = ("Layer", "Kernel", "Type", "Codes", "Differing", "Largest", "Verdict")
    told = (
        f"The exported file and the simulation on {found.images} images: {'exact' if found.exact else 'NOT exact'};"
        f" the largest difference of logits is {number(found.logit_difference, 3)}."
    )
    return join([tag("p", told), table(heads, rows, "Codes of each tensor", id_="verified")])


def origin_section(report: RunReport) -> Markup | None:
    """How to have it again: command, settings, versions, hashes."""
    origin = report.origin
    facts = {
        "Repeat": origin.repeat,
        "Command": origin.command,
        "Program": f"qlib-compress {origin.version}",
        "Began": f"{origin.started}, took {seconds(origin.seconds)}",
        "Weights": f"hash {origin.weights}" if origin.weights else "",
        "Test images": f"hash {report.tested.images}" if report.tested is not None else "",
        "Exit code": str(origin.exit_code),
    }
    written = [(each.name, each.what, figure_cell(each.bytes, size(each.bytes)), tag("code", each.sha256))
               for each in report.files]  # fmt: skip
    given = [(name, value) for name, value in report.settings.items() if _flag(name) in report.given]
    rest = [(name, value) for name, value in report.settings.items() if _flag(name) not in report.given]
    return join(
        [
            table(("What", "Value"), [(name, tag("code", text)) for name, text in facts.items() if text], "This run"),
            table(("File", "What", "Size", "SHA-256"), written, "Files written") if written else None,
            table(("Setting", "Value"), given, "Settings that were given") if given else None,
            tag("details", tag("summary", "All other settings"), table(("Setting", "Value"), rest, "Settings")),
            tag("details", tag("summary", "Machine and versions"),
                table(("What", "Value"), report.environment.items(), "Machine and versions")),
        ]
    )  # fmt: skip


def _flag(name: str) -> str:
    """The flag of a setting, as the report lists those that were given.

    >>> _flag("qe.bits_wts"), _flag("train.lr")
    ('--qe-bits-wts', '--lr')
    """
    group, _, key = name.rpartition(".")
    words = key if group in ("", "train") else f"{group}-{key}"
    return "--" + words.replace("_", "-")
