"""Activation statistics in one pass over the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qlib.errors import StatsError
from qlib.graph.ir import Graph, attribute, is_constant, is_layer, is_move, layer_inputs, layers, name_of
from qlib.stats.histogram import Histogram
from qlib.stats.histogram_rows import HistogramRows
from qlib.stats.observer import Observer
from qlib.stats.sums import Sums
from qlib.stats.tensor_stats import LayerStats, TensorStats
from qlib.tensor_file import read_tensors, write_tensors

__all__ = ["MICRO_BATCH", "Collector"]

MICRO_BATCH = 16
"""Images in one forward pass: small enough that an activation is still in cache when its statistics are taken."""

_ROWS = "histograms."
_SAME_VALUES = frozenset(
    [
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone", "roll"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "mT"),
    ]
)
"""Moves whose output holds all values of their input: it has the statistics of that, and is not measured."""


class Collector:
    """Runs a captured float graph and keeps, for each activation tensor, what `TensorStats` needs.

    The mean absolute deviation takes one pass as well: ``sum |x - m| ~= sum (x - m) sgn(x - p)``, with the running
    mean p when the batch arrived for the final mean m; the error is of second order in ``p - m``.
    Memory is one row of numbers for each tensor, whatever the number of images; with `histograms`, one of counts too.
    Of a large tensor an eighth of the values is counted (see `Observer`); minimum and maximum are those of all values.
    """

    def __init__(self, graph: Graph, *, histograms: bool = False) -> None:
        self._graph = graph
        self._nodes = self._measured()
        self._shapes: dict[str, list[int]] = {}
        self._state: Sums | None = None
        self._observer = Observer(graph, self._nodes, histograms)
        self._rows = HistogramRows.empty(len(self._nodes), self._observer.device) if histograms else None

    def _measured(self) -> list[fx.Node]:
        """The tensors to measure: model inputs, layer outputs, and the parts of such that are layer inputs."""
        found: set[fx.Node] = set()
        for node in self._graph.graph.nodes:
            if node.op == "placeholder" or (is_layer(self._graph, node) and "shape" in node.meta):
                found.add(node)
            if is_layer(self._graph, node):
                found.update(self._origin(source) for source in layer_inputs(node))
        return [node for node in self._graph.graph.nodes if node in found and not is_constant(node)]

    def _origin(self, node: fx.Node) -> fx.Node:
        """The first node that held exactly these values."""
        while is_move(self._graph, node) and node.op != "call_module" and _operation(node) in _SAME_VALUES:
            node = layer_inputs(node)[0]
        return node

    @property
    def samples(self) -> int:
        """The number of images measured."""
        return 0 if self._state is None else int(self._state.samples)

    @torch.inference_mode()
    def update(self, images: Tensor, consumed: int | None = None) -> None:
        """Adds a batch ``[N, ...]``, in micro-batches, whole or (when interrupted) not at all.

        `consumed` is how many images the data set was asked for, N unless corrupt ones were left out.
        Raises StatsError, naming the layer, for a NaN or infinity.
        """
        state, rows = self._state, self._rows
        for part in torch.split(images, MICRO_BATCH):
            batch, shapes = self._observer.measure(part, state)
            if not bool(torch.isfinite(batch.s2).all()):  # NaN or infinity anywhere ends up here
                self._refuse(batch.s2, 0 if state is None else int(state.samples))
            state = batch if state is None else state.add(batch)
            self._shapes = self._shapes or shapes
            if rows is not None:
                rows = rows.add(self._observer.values, *torch.stack([state.min, state.max]).tolist())
        if state is not None and consumed is not None:
            state = replace(state, consumed=state.consumed + (consumed - len(images)))
        self._state, self._rows = state, rows

    def _refuse(self, s2: Tensor, samples: int) -> None:
        bad = (~torch.isfinite(s2)).tolist()
        node = next(node for node, is_bad in zip(self._nodes, bad, strict=True) if is_bad)
        raise StatsError(
            f"the output of {name_of(node)!r} holds NaN or infinity, in images {samples} to"
            f" {samples + MICRO_BATCH - 1} of the calibration set; check the weights and these images"
        )

    def result(self) -> dict[str, LayerStats]:
        """Layer name -> statistics, in execution order, without layers that give more than one tensor.

        Raises StatsError when no image was seen.
        """
        if self._state is None:
            raise StatsError("no image was seen, so there are no statistics; calibrate on at least one image")
        columns = {name: values.expand(len(self._nodes)).tolist() for name, values in vars(self._state).items()}
        measured: dict[fx.Node, TensorStats] = {}
        for i, node in enumerate(self._nodes):
            row = {name: values[i] for name, values in columns.items()}
            stats = self._tensor_stats(row, self._shapes[node.name])
            measured[node] = replace(stats, histogram=self._histogram(i, measured, stats))

        def stats_of(node: fx.Node) -> TensorStats:
            origin = self._origin(node)
            if not is_constant(origin):
                return measured[origin]
            return _constant_stats(attribute(self._graph, origin), with_histogram=self._rows is not None)

        return {
            name_of(node): LayerStats(tuple(map(stats_of, layer_inputs(node))), measured[node])
            for node, _ in layers(self._graph)
            if node in measured
        }

    def _tensor_stats(self, row: Mapping[str, float], shape: list[int]) -> TensorStats:
        n = row["count"]
        offset = row["s1"] / n
        mean = row["reference"] + offset
        return TensorStats(
            count=int(n),
            samples=self.samples,
            min=row["min"],
            max=row["max"],
            avg_min=row["avg_min"] / self.samples,
            avg_max=row["avg_max"] / self.samples,
            mean=mean,
            std=max(row["s2"] / n - offset**2, 0.0) ** 0.5,
            b=max(row["absolute"] + row["sign_pivot"] - mean * row["sign"], 0.0) / n,
            shape=tuple(shape),
        )

    def _histogram(self, i: int, measured: Mapping[fx.Node, TensorStats], stats: TensorStats) -> Histogram | None:
        """The histogram of tensor i; that of a ReLU follows from its input's."""
        if self._rows is None:
            return None
        limit = self._observer.relus.get(self._nodes[i])
        if limit is None:
            return self._rows.row(i, stats.min, stats.max)
        before = measured[layer_inputs(self._nodes[i])[0]].histogram
        return None if before is None else before.clipped(0.0, limit)

    def save(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Writes all that `load` needs to go on from here, whole or not at all."""
        assert self._state is not None
        header = {"fingerprint": fingerprint, "shapes": self._shapes}
        rows = {} if self._rows is None else self._rows.state()
        tensors = vars(self._state) | {_ROWS + name: value for name, value in rows.items()}
        texts = {"qlib": json.dumps(header, sort_keys=True)}
        write_tensors(path, tensors, "the statistics so far", texts, parents=True)

    def load(self, path: Path, fingerprint: Mapping[str, Any], total: int) -> int:
        """Goes on from a file of `save`: how many of `total` images it consumed.

        0 where it is absent, damaged, of another calibration, or claims what cannot be.
        """
        try:
            tensors, texts = read_tensors(path, ours=True)
        except OSError:
            return 0
        header = json.loads(texts.get("qlib", "{}"))
        if header.get("fingerprint") != json.loads(json.dumps(fingerprint)):
            return 0
        rows = {name.removeprefix(_ROWS): tensors.pop(name) for name in list(tensors) if name.startswith(_ROWS)}
        if bool(rows) != (self._rows is not None) or not self._may_be(tensors, total):
            return 0
        device = self._observer.device
        self._state = Sums(**{name: value.to(device) for name, value in tensors.items()})
        self._rows = HistogramRows.of_state(rows, device) if rows else None
        self._shapes = header["shapes"]
        return int(self._state.consumed)

    def _may_be(self, tensors: Mapping[str, Tensor], total: int) -> bool:
        """Whether these can be the sums of so many images at most, over the tensors that are measured."""
        counts = {"samples", "consumed"}
        if set(tensors) != {field.name for field in fields(Sums)} or not all(map(_is_finite, tensors.values())):
            return False
        rows = {name: 1 if name in counts else len(self._nodes) for name in tensors}
        if any(value.shape != (rows[name],) for name, value in tensors.items()):
            return False
        return bool(0 < tensors["samples"] <= tensors["consumed"] <= total)


def _is_finite(value: Tensor) -> bool:
    return value.dtype == torch.float64 and bool(torch.isfinite(value).all())


def _operation(node: fx.Node) -> str:
    """Its name, without the overload of an ATen op: ``transpose`` for ``transpose.int``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _constant_stats(value: Tensor, *, with_histogram: bool) -> TensorStats:
    """Statistics of a tensor that does not depend on the images."""
    x = value.detach().double()
    mean = float(x.mean())
    low, high = float(x.min()), float(x.max())
    deviation = x - mean
    return TensorStats(
        count=x.numel(), samples=1, min=low, max=high, avg_min=low, avg_max=high, mean=mean,
        std=float(deviation.square().mean().sqrt()), b=float(deviation.abs().mean()), shape=tuple(x.shape),
        histogram=Histogram.of(x.cpu().numpy()) if with_histogram else None,
    )  # fmt: skip
