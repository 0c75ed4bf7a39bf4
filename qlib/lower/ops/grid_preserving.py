"""Layers that act on the codes themselves and keep the grid of their input: ReLU and max pooling."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, Edge, Edges, ExactLayer, Lowered, Site
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ClampCodes"]


class ClampCodes(ExactLayer):
    """ReLU or ReLU6 on centered codes: a clamp at the code of zero, and at that of six."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, codes: Tensor) -> Tensor:
        return torch.clamp(codes, self.low, self.high)

    def qdq(self, inputs: Edges, output: Edge | None) -> nn.Module:
        """The same clamp, of the codes that are deployed; of 16-bit ones, for which ONNX Runtime has none, in float."""
        (edge,) = inputs
        assert edge is not None
        if edge.dtype == torch.uint16:
            return QdqLayer(nn.Identity(), inputs, output)
        return ClampCodes(self.low + edge.zero_point, self.high + edge.zero_point)


@LOWERINGS.register("relu")
def lower_relu(site: Site) -> Lowered:
    """A clamp of the codes; in float where the input is."""
    (edge,) = site.inputs
    if edge is None:
        return copy.deepcopy(site.module), None
    high = min(edge.high, round(6.0 / float(edge.scale))) if isinstance(site.module, nn.ReLU6) else edge.high
    out = edge.with_bounds(0, high)
    return ClampCodes(out.low, out.high), out


@LOWERINGS.register("max_pool")
def lower_max_pool(site: Site) -> Lowered:
    """The maximum of codes is the code of the maximum."""
    return copy.deepcopy(site.module), site.inputs[0]
