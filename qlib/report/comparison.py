"""Several runs side by side: their results and costs, which of them are best, and in what they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from qlib.errors import DataError
from qlib.metrics import mcnemar, wilson_interval
from qlib.report.html.answer import in_integers, model_bytes
from qlib.report.record import Predicted, Result, RunReport
from qlib.report.record_parts import Layer

__all__ = ["Pair", "Side", "changed_results", "different_layers", "different_settings", "front", "pairs", "sides"]

_LARGEST_CLASS = 2**31


@dataclass(frozen=True)
class Side:
    """A run in a comparison: its name there, its record, and its first result, which is what it is about."""

    name: str
    report: RunReport
    result: Result
    tested: Predicted

    @property
    def bytes(self) -> int:
        """Of weights and biases, at their bits."""
        return model_bytes(self.report)[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(each.macs or 0 for each in self.report.layers)

    @property
    def in_integers(self) -> float | None:
        """The share of those that are computed in integers, 0 to 1."""
        return in_integers(self.report)

    @property
    def agreement(self) -> float | None:
        """With the float model of the same run, in percent."""
        return next((each.agreement for each in self.report.versus if each.other == "fp32"), None)

    @property
    def predictions(self) -> Tensor:
        """``[N]``, of the model that the run is about."""
        return torch.tensor(self.tested.predictions[self.result.model])


def sides(reports: Mapping[str, RunReport]) -> list[Side]:
    """The runs, by name, that may be compared.

    Raises:
        DataError: one has no results, holds what cannot be, or looked at other images than the first.
    """
    found = [_side(name, report) for name, report in reports.items()]
    first = found[0]
    for each in found[1:]:
        if (each.tested.images, each.tested.labels) != (first.tested.images, first.tested.labels):
            raise DataError(
                f"the run {each.name!r} looked at {len(each.tested.labels):,} images and {first.name!r} at"
                f" {len(first.tested.labels):,}, which are not the same; compare runs with the same data,"
                " --effective-test-size and --seed"
            )
    return found


def _side(name: str, report: RunReport) -> Side:
    if not report.results or report.tested is None:
        raise DataError(f"the run {name!r} tested no model, so it has no results to compare; give others")
    result, tested = report.results[0], report.tested
    columns = [tested.labels, tested.predictions.get(result.model, ())]
    if {len(each) for each in columns} != {result.samples} or not tested.labels:
        raise DataError(f"the report of {name!r} is damaged: it has not one prediction for each image; run it again")
    if not all(0 <= each < _LARGEST_CLASS for column in columns for each in column):
        raise DataError(f"the report of {name!r} is damaged: it has predictions that are no class; run it again")
    return Side(name, report, result, tested)


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The Pareto front: those for which no other one costs no more and gains no less, and differs; cheapest first.

    >>> front([3.0, 1.0, 2.0, 2.0], [9.0, 5.0, 8.0, 7.0])
    [1, 2, 0]
    """
    best, found = float("-inf"), []
    for index in sorted(range(len(costs)), key=lambda each: (costs[each], -gains[each])):
        if gains[index] > best:
            best = gains[index]
            found.append(index)
    return found


@dataclass(frozen=True)
class Pair:
    """Two runs, image by image, in percent: `lost` are right only in the first, `won` only in the second."""

    first: str
    second: str
    agreement: float
    low: float
    high: float
    lost: int
    won: int
    p_value: float


def pairs(runs: Sequence[Side]) -> list[Pair]:
    """Every two of the runs, which looked at the same images."""
    labels = torch.tensor(runs[0].tested.labels)
    predictions = {each.name: each.predictions for each in runs}
    return [
        _pair(one, other, predictions[one], predictions[other], labels) for one, other in combinations(predictions, 2)
    ]


def _pair(one: str, other: str, first: Tensor, second: Tensor, labels: Tensor) -> Pair:
    lost = int(((first == labels) & (second != labels)).sum())
    won = int(((second == labels) & (first != labels)).sum())
    same = float((first == second).double().mean())
    return Pair(one, other, 100 * same, *wilson_interval(same, len(labels)), lost, won, mcnemar(lost, won))


def different_settings(runs: Sequence[Side]) -> dict[str, list[str]]:
    """Setting -> its value in each run, of those that are not the same in all; names and folders of output apart."""
    names = dict.fromkeys(name for each in runs for name in each.report.settings)
    rows = {name: [each.report.settings.get(name, "") for each in runs] for name in names if name not in _OUTPUT}
    rows["version"] = [each.report.origin.version for each in runs]
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


_OUTPUT = frozenset({"name", "out_dir", "print_freq", "verbose", "no_report", "workers"})


def different_layers(runs: Sequence[Side]) -> dict[str, list[str]]:
    """Layer -> what each run does with it, of those with which not all do the same."""
    described = [{each.name: _described(each) for each in run.report.layers} for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    rows = {name: [each.get(name, "absent") for each in described] for name in names}
    return {name: texts for name, texts in rows.items() if len(set(texts)) > 1}


def _described(layer: Layer) -> str:
    """Its grids and its arithmetic in a few words."""
    return ", ".join(_words(layer)) or "float"


def _words(layer: Layer) -> Iterator[str]:
    if layer.weight_bits is not None:
        yield f"W{layer.weight_bits} {layer.weight_mode}"
    if layer.bits is not None:
        yield f"A{layer.bits} {layer.mode} {layer.clip}"
    if layer.why_float:
        yield f"float: {layer.why_float}"
    if layer.shape:
        yield "x".join(map(str, layer.shape))


def changed_results(before: RunReport, now: RunReport) -> list[str]:
    """What of the results is not the same, to the last digit, in words; nothing where all is.

    The models that both tested count, and the images.
    """
    if (before.tested and before.tested.images) != (now.tested and now.tested.images):
        return ["other images were tested"]
    known = {each.model: each for each in before.results}
    return [
        f"{each.model} {name} was {getattr(known[each.model], name):.6g} and is {getattr(each, name):.6g}"
        for each in now.results
        if each.model in known
        for name in ("top1", "top5", "loss")
        if getattr(known[each.model], name) != getattr(each, name)
    ]
