"""Layers that act on the codes themselves and keep the grid of their input: ReLU and max pooling."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, LayerContext, Lowered
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ClampCodes"]


class ClampCodes(ExactLayer):
    """ReLU or ReLU6 on centered codes: a clamp at the code of zero, and at that of six."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, codes: Tensor) -> Tensor:
        return torch.clamp(codes, self.low, self.high)

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The same clamp, of the codes that are deployed; of 16-bit ones, for which ONNX Runtime has none, in float."""
        (grid,) = inputs
        assert grid is not None
        if grid.dtype == torch.uint16:
            return QdqLayer(nn.Identity(), inputs, output)
        return ClampCodes(self.low + grid.zero_point, self.high + grid.zero_point)


@LOWERINGS.register("relu")
def lower_relu(context: LayerContext) -> Lowered:
    """A clamp of the codes; in float where the input is."""
    (grid,) = context.inputs
    if grid is None:
        return copy.deepcopy(context.module), None
    high = min(grid.high, round(6.0 / float(grid.scale))) if isinstance(context.module, nn.ReLU6) else grid.high
    out = grid.with_bounds(0, high)
    return ClampCodes(out.low, out.high), out


@LOWERINGS.register("max_pool")
def lower_max_pool(context: LayerContext) -> Lowered:
    """The maximum of codes is the code of the maximum."""
    return copy.deepcopy(context.module), context.inputs[0]
