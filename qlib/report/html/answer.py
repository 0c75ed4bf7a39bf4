"""The first lines of a page: what came out, what changed, what it costs, whether it is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from qlib.report.html.markup import Child, Markup, tag
from qlib.report.html.numbers import number, percent, size
from qlib.report.record import Result, RunReport, Versus

__all__ = ["answer", "in_integers", "model_bytes"]

_Card: TypeAlias = "tuple[str, str, Child]"
_SURE = 0.05


def answer(report: RunReport) -> Markup:
    """The cards, of those things that the run found."""
    cards = [
        tag("div", tag("dt", title), tag("dd", tag("strong", value), more)) for title, value, more in _cards(report)
    ]
    return tag("dl", *cards, class_="cards")


def _cards(report: RunReport) -> Iterator[_Card]:
    if report.results:
        yield from _accuracy(report.results[0], report)
    if report.versus:
        yield _agreement(report.versus[0])
    stored, in_float = model_bytes(report)
    if in_float:
        smaller = (
            f"{in_float / stored:.2f} times smaller than {size(in_float)} in float" if stored < in_float else "in float"
        )
        yield "Weights", size(stored), smaller
    share = in_integers(report)
    if share is not None:
        yield "Multiply-accumulates in integers", percent(share), _where(report)
    if report.verification is not None:
        yield _verified(report)
    if report.auto is not None:
        met = "reached" if report.auto.reached else "not reached"
        yield "Search", f"target {met}", f"{report.auto.target}; {len(report.auto.trials)} settings were tried"
    if report.calibration is not None:
        yield "Calibration", f"{report.calibration.samples:,} images", f"of the {report.calibration.split} split"
    if report.training is not None and report.training.best_epoch is not None:
        yield "Best epoch", str(report.training.best_epoch), f"{len(report.training.epochs)} epochs in this run"


def _accuracy(first: Result, report: RunReport) -> Iterator[_Card]:
    interval = f"95 % interval {first.low:.2f} to {first.high:.2f}, {first.samples:,} images; Top5 {first.top5:.2f} %"
    yield f"Top1, {first.model}", f"{first.top1:.2f} %", interval
    before = next((each for each in report.results[1:] if each.model == "fp32"), None)
    if before is not None:
        change = f"{first.top1 - before.top1:+.2f} points"
        yield (
            "Top1 against FP32",
            change,
            f"FP32 has {before.top1:.2f} %; loss {before.loss:.4f} became {first.loss:.4f}",
        )


def _agreement(versus: Versus) -> _Card:
    told = (
        f"right only in {versus.other}: {versus.lost}, only in {versus.model}: {versus.won};"
        f" McNemar p = {number(versus.p_value, 3)}: {'a' if versus.p_value < _SURE else 'no'} significant difference"
    )
    return f"Predictions as {versus.other}", f"{versus.agreement:.2f} %", told


def _verified(report: RunReport) -> _Card:
    found = report.verification
    assert found is not None
    told = f"{found.agreeing} of {found.images} predictions agree in ONNX Runtime"
    if found.first_differing:
        told += f"; {found.first_differing} is the first layer that differs"
    return "Exported file", "exact" if found.exact else "NOT exact", told


def _where(report: RunReport) -> str:
    if report.deployment is not None:
        return "by ONNX Runtime's kernels for the exported file"
    return f"in {sum(each.integer for each in report.layers)} of {len(report.layers)} layers, as planned"


def model_bytes(report: RunReport) -> tuple[int, int]:
    """Of all weights and biases: their bytes at the bits of the plan, and in float32."""
    return sum(each.bytes for each in report.layers), sum(each.float_bytes for each in report.layers)


def in_integers(report: RunReport) -> float | None:
    """The share of multiply-accumulates in integers, as deployed if that is known; None without a plan."""
    if report.deployment is not None:
        return report.deployment.integer_share
    total = sum(each.macs or 0 for each in report.layers)
    if not total or not any(each.bits or each.weight_bits for each in report.layers):
        return None
    return sum(each.macs or 0 for each in report.layers if each.integer) / total
