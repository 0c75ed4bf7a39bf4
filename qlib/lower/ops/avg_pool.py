"""Average pooling over windows, as ONNX Runtime's QLinearAveragePool computes it: in float, zero point inside."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactAvgPool"]


class ExactAvgPool(ExactLayer):
    """``sat(rint(avg((q - z_x) * s_x) / s_y + z_y))``."""

    scale: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        (grid,) = context.codes_in()
        self.pool = copy.deepcopy(context.module)
        self.grid = Grid(context.output)
        self.register_buffer("scale", grid.scale, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        y: Tensor = self.pool(codes * self.scale)
        return self.grid.round_inside(y.div_(self.grid.scale))

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(self.pool, inputs, output)


@LOWERINGS.register("avg_pool")
def lower_avg_pool(context: LayerContext) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactAvgPool(context), context.output) if context.integer else lower_float(context)
