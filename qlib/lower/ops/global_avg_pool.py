"""Mean over the spatial axes, as ONNX Runtime's QLinearGlobalAveragePool computes it."""

from __future__ import annotations

from torch import Tensor, nn

from qlib.lower.base import (
    EXACT_LIMIT,
    LOWERINGS,
    ActivationGrid,
    ActivationGrids,
    ExactLayer,
    Grid,
    LayerContext,
    Lowered,
)
from qlib.lower.onnx_ops import global_average_pool
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactGlobalAvgPool"]


class ExactGlobalAvgPool(ExactLayer):
    """``sat(rint(float32(S) * (s_x / (s_y * N))) + z_y)`` with the integer sum S of N centered codes."""

    scale: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        (grid,) = context.codes_in()
        self.keepdim = getattr(context.module, "keepdim", True)
        self.magnitude = grid.magnitude
        self.grid = Grid(context.output)
        self.register_buffer("scale", grid.scale, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        count = codes.shape[-1] * codes.shape[-2]
        exact = codes if count * self.magnitude < EXACT_LIMIT else codes.double()
        total = exact.sum((-2, -1), keepdim=self.keepdim).float()
        return self.grid.forward(total.mul_(self.scale / (self.grid.scale * count)))

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize; the axes are dropped from the codes."""
        return QdqLayer(_GlobalAveragePool(), inputs, output, after=None if self.keepdim else nn.Flatten())


class _GlobalAveragePool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = global_average_pool(x)
        return y


@LOWERINGS.register("global_avg_pool")
def lower_global_avg_pool(context: LayerContext) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactGlobalAvgPool(context), context.output) if context.integer else lower_float(context)
