"""Activation statistics in one pass over the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.errors import StatsError
from qlib.graph.ir import Graph, attribute, is_constant, is_layer, is_move, layer_inputs, layers, name_of
from qlib.stats.histogram import Histogram
from qlib.stats.histogram_rows import HistogramRows
from qlib.stats.tensor_stats import LayerStats, TensorStats
from qlib.tensor_file import read_tensors, write_tensors

__all__ = ["MICRO_BATCH", "Collector"]

MICRO_BATCH = 16
"""Images in one forward pass: small enough that an activation is still in cache when its statistics are taken."""

_PERIOD, _BLOCK = 1021, 127
_ROWS = "histograms."
_SAME_VALUES = frozenset(
    {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "swapaxes"}
)


@dataclass(frozen=True)
class _State:
    """What is kept for each of E tensors: float64, sums over all elements seen, with a running pivot p.

    `reference` is the mean of the first batch: s1 = sum(x - r) and s2 = sum((x - r)^2) do not cancel.
    `absolute` = sum|x - p|, `sign` = sum sgn(x - p), `sign_pivot` = sum p sgn(x - p). `samples` images were measured
    of the `consumed` ones that the data set was asked for (corrupt ones are left out).
    """

    min: Tensor
    max: Tensor
    avg_min: Tensor
    avg_max: Tensor
    reference: Tensor
    s1: Tensor
    s2: Tensor
    absolute: Tensor
    sign: Tensor
    sign_pivot: Tensor
    count: Tensor
    samples: Tensor
    consumed: Tensor

    @property
    def mean(self) -> Tensor:
        return self.reference + self.s1 / self.count

    @property
    def is_offset(self) -> Tensor:
        """Where the mean is so far from 0 that float32 sums of squares need an origin near it."""
        variance = self.s2 / self.count - (self.s1 / self.count).square()
        return self.mean.square() > 16 * variance

    def add(self, batch: _State) -> _State:
        """The sums of both; the reference of `self` stays."""
        shift = batch.reference - self.reference
        sums = {
            name: getattr(self, name) + getattr(batch, name)
            for name in ("avg_min", "avg_max", "absolute", "sign", "sign_pivot", "count", "samples", "consumed")
        }
        return _State(
            min=torch.minimum(self.min, batch.min),
            max=torch.maximum(self.max, batch.max),
            reference=self.reference,
            s1=self.s1 + batch.s1 + batch.count * shift,
            s2=self.s2 + batch.s2 + shift * (2 * batch.s1 + batch.count * shift),
            **sums,
        )


class Collector:
    """Runs a captured float graph and keeps, for each activation tensor, what `TensorStats` needs.

    The mean absolute deviation takes one pass as well: ``sum |x - m| ~= sum (x - m) sgn(x - p)``, with the running
    mean p when the batch arrived for the final mean m; the error is of second order in ``p - m``.
    Memory is one row of numbers for each tensor, whatever the number of images; with `histograms`, one of counts too.
    Of a large tensor an eighth of the values is counted (see `_sample`); minimum and maximum are those of all values.
    """

    def __init__(self, graph: Graph, *, histograms: bool = False) -> None:
        self._graph = graph
        self._nodes = self._measured()
        self._shapes: dict[str, list[int]] = {}
        self._state: _State | None = None
        self._observer = _Observer(graph, self._nodes, histograms)
        self._rows = HistogramRows.empty(len(self._nodes), self._observer.device) if histograms else None

    def _measured(self) -> list[fx.Node]:
        """The tensors to measure: model inputs, layer outputs, and the parts of such that are layer inputs."""
        found: set[fx.Node] = set()
        for node in self._graph.graph.nodes:
            if node.op == "placeholder" or is_layer(self._graph, node):
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
        """Layer name -> statistics, in execution order. Raises StatsError when no image was seen."""
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

    def load(self, path: Path, fingerprint: Mapping[str, Any]) -> int:
        """Goes on from a file of `save`: how many images it consumed; 0 where absent or of another calibration."""
        try:
            tensors, texts = read_tensors(path)
        except OSError:
            return 0
        header = json.loads(texts.get("qlib", "{}"))
        if header.get("fingerprint") != json.loads(json.dumps(fingerprint)):
            return 0
        rows = {name.removeprefix(_ROWS): tensors.pop(name) for name in list(tensors) if name.startswith(_ROWS)}
        if bool(rows) != (self._rows is not None):
            return 0
        device = self._observer.device
        self._state = _State(**{name: value.to(device) for name, value in tensors.items()})
        self._rows = HistogramRows.of_state(rows, device) if rows else None
        self._shapes = header["shapes"]
        return int(self._state.consumed)


def _operation(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class _Observer(fx.Interpreter):
    """Runs the graph and measures the tensors of `nodes` as they are computed."""

    def __init__(self, graph: Graph, nodes: list[fx.Node], keep_values: bool) -> None:
        super().__init__(graph)
        self.keep_values = keep_values
        self.index = {node: i for i, node in enumerate(nodes)}
        self.device = next((t.device for t in graph.state_dict().values()), torch.device("cpu"))
        self.scratch = torch.empty(0, device=self.device)
        self.zero = torch.zeros((), device=self.device)
        self.relus = {
            node: 6.0 if isinstance(module, nn.ReLU6) else torch.inf
            for node, module in layers(graph)
            if isinstance(module, (nn.ReLU, nn.ReLU6)) and layer_inputs(node)[0] in self.index
        }

    def measure(self, images: Tensor, before: _State | None) -> tuple[_State, dict[str, list[int]]]:
        """The sums of one micro-batch, and the shape of each tensor; pivots come from the state so far."""
        self.samples = len(images)
        self.first = before is None
        self.pivots = [self.zero] * len(self.index) if before is None else list(before.mean.float().unbind())
        self.shifted = [True] * len(self.index) if before is None else before.is_offset.tolist()
        self.ranges: list[Tensor] = [images] * len(self.index)
        self.sums: list[Tensor] = [images] * len(self.index)
        self.counts = [0] * len(self.index)
        self.values: list[Tensor | None] = [None] * len(self.index)
        self.shapes: dict[str, list[int]] = {}
        self.run(images)
        return self._batch_state(), self.shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        index = self.index.get(n)
        if index is not None:
            self.shapes[n.name] = list(value.shape)
            self.counts[index] = value.numel()
            flat = _samples(value, self.samples)
            self.ranges[index] = self._range(n, flat)
            if self.scratch.numel() < flat.numel():
                self.scratch = torch.empty(flat.numel(), device=flat.device)
            if self.first:
                self.pivots[index] = flat.mean()
            pivot = self.pivots[index]
            origin, cut = (pivot, self.zero) if self.shifted[index] else (None, pivot)
            self.sums[index] = _sums(flat.view(-1), origin, cut, self.scratch[: flat.numel()])
            if self.keep_values and n not in self.relus:
                self.values[index] = _sample(flat.view(-1), least_rows=64).clone()
        return value

    def _range(self, node: fx.Node, flat: Tensor) -> Tensor:
        """``[2, samples]``: minimum and maximum of each sample; those of a ReLU follow from its input's."""
        limit = self.relus.get(node)
        if limit is not None:
            return self.ranges[self.index[layer_inputs(node)[0]]].clamp(0.0, limit)
        low, high = flat.amin(1), flat.amax(1)
        return (
            torch.stack([low, high]) if len(low) == self.samples else torch.stack([low, high]).expand(2, self.samples)
        )

    def _batch_state(self) -> _State:
        """All tensors' results at once: many small operations would cost as much as the large ones."""
        low, high = torch.stack(self.ranges, 1).double().unbind()
        s1, s2, absolute, sign = torch.stack(self.sums, 1).double().unbind()
        pivot = torch.stack(self.pivots).double()
        shifted = torch.tensor(self.shifted, device=low.device)
        origin = torch.where(shifted, pivot, 0.0)
        count = torch.tensor(self.counts, dtype=torch.float64, device=low.device)
        samples = torch.full((1,), self.samples, dtype=torch.float64, device=low.device)
        return _State(
            min=low.amin(1),
            max=high.amax(1),
            avg_min=low.sum(1),
            avg_max=high.sum(1),
            reference=origin,
            s1=s1,
            s2=s2,
            absolute=absolute * count,
            sign=sign * count,
            sign_pivot=pivot * sign * count,
            count=count,
            samples=samples,
            consumed=samples.clone(),  # a file holds no two tensors in one memory
        )


def _samples(x: Tensor, samples: int) -> Tensor:
    """``[samples, elements]``, a view where possible; ``[1, elements]`` where the samples cannot be told apart."""
    x = x.float() if x.dtype != torch.float32 else x
    if x.ndim == 4 and x.stride(1) == 1:  # channels last, or a part of such
        x = x.permute(0, 2, 3, 1)
    return x.reshape(samples if x.shape[0] % samples == 0 else 1, -1).contiguous()


def _sums(x: Tensor, origin: Tensor | None, cut: Tensor, scratch: Tensor) -> Tensor:
    """Sums of y and y^2 for ``y = x - origin``, and means of |y - cut| and of sgn(y - cut)."""
    y = x if origin is None else torch.sub(x, origin, out=scratch)
    deviation = _sample(y) - cut
    sign = torch.sign(deviation).mean()
    return torch.stack([y.sum(), torch.dot(y, y), deviation.abs_().mean(), sign])


def _sample(x: Tensor, least_rows: int = 256) -> Tensor:
    """All of a small tensor; of a large one 127 values in every 1,021: an eighth, of every place and channel.

    1,021 is prime, so that the blocks do not fall on the same channels again and again.
    """
    rows = len(x) // _PERIOD
    return x if rows < least_rows else x[: rows * _PERIOD].view(rows, _PERIOD)[:, :_BLOCK]


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
