"""Measures the activations of a graph while it runs on a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, layer_inputs, layers
from qlib.stats.sums import Sums

__all__ = ["Observer"]

_PERIOD, _BLOCK = 1021, 127


class Observer(fx.Interpreter):
    """Runs a graph and measures the tensors of `nodes` as they are computed.

    Sums and ranges are of all values; deviations from the pivot, and the values that a histogram counts, are of an
    eighth of a large tensor (`_sample`).
    """

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

    def measure(self, images: Tensor, before: Sums | None) -> tuple[Sums, dict[str, list[int]]]:
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
            self.sums[index] = _sums_of(flat.view(-1), origin, cut, self.scratch[: flat.numel()])
            if self.keep_values and n not in self.relus:
                self.values[index] = _sample(flat.view(-1), min_rows=64).clone()
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

    def _batch_state(self) -> Sums:
        """All tensors' results at once: many small operations would cost as much as the large ones."""
        low, high = torch.stack(self.ranges, 1).double().unbind()
        s1, s2, absolute, sign = torch.stack(self.sums, 1).double().unbind()
        pivot = torch.stack(self.pivots).double()
        shifted = torch.tensor(self.shifted, device=low.device)
        origin = torch.where(shifted, pivot, 0.0)
        count = torch.tensor(self.counts, dtype=torch.float64, device=low.device)
        samples = torch.full((1,), self.samples, dtype=torch.float64, device=low.device)
        return Sums(
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


def _sums_of(x: Tensor, origin: Tensor | None, cut: Tensor, scratch: Tensor) -> Tensor:
    """Sums of y and y^2 for ``y = x - origin``, and means of |y - cut| and of sgn(y - cut)."""
    y = x if origin is None else torch.sub(x, origin, out=scratch)
    deviation = _sample(y) - cut
    sign = torch.sign(deviation).mean()
    return torch.stack([y.sum(), torch.dot(y, y), deviation.abs_().mean(), sign])


def _sample(x: Tensor, min_rows: int = 256) -> Tensor:
    """All of a small tensor; of a large one 127 values in every 1,021: an eighth, of every place and channel.

    1,021 is prime, so that the blocks do not fall on the same channels again and again.
    """
    rows = len(x) // _PERIOD
    return x if rows < min_rows else x[: rows * _PERIOD].view(rows, _PERIOD)[:, :_BLOCK]
