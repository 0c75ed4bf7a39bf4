"""Sigmoid: a table of the quantized values of its output, one for each of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer


class ExactSigmoid(ExactLayer):
    """``T[q]`` with ``T[q] = sat(rint(sigmoid((q - z_x) * s_x) / s_y) + z_y)``."""

    table: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        (grid,) = context.codes_in()
        self.low = grid.low
        codes = torch.arange(grid.low, grid.high + 1)
        table = Grid(context.output).quantize(torch.sigmoid(codes * grid.scale))
        self.register_buffer("table", table, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        return self.table[(codes - self.low).long()]

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(nn.Sigmoid(), inputs, output)


@LOWERINGS.register("sigmoid")
def lower_sigmoid(context: LayerContext) -> Lowered:
    """The table where the kind has an exact form for these codes; in float otherwise."""
    return (ExactSigmoid(context), context.output) if context.integer else lower_float(context)
