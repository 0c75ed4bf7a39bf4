"""Product of two tensors, as ONNX Runtime's QLinearMul computes it."""

from __future__ import annotations

from torch import Tensor, nn

from qlib.graph.ops import Mul
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
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer
from qlib.quant.affine import requant_factor

__all__ = ["ExactMul"]


class ExactMul(ExactLayer):
    """``sat(rint(((q_a - z_a) * (q_b - z_b)) * m + z_y))`` with ``m = (s_a * s_b) / s_y``; two roundings, no fma.

    `alpha` is folded into the scale of `a`.
    """

    factor: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        assert isinstance(context.module, Mul)
        self.alpha = context.module.alpha
        a, b = context.codes_in()
        factor = requant_factor(a.times(self.alpha).scale, b.scale, context.output.scale)
        self.grid = Grid(context.output)
        self.wide = a.magnitude * b.magnitude >= EXACT_LIMIT
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = (a.double() * b.double()).float() if self.wide else a * b
        return self.grid.round_inside(product.mul_(self.factor))

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize; `alpha` is in a scale."""
        return QdqLayer(Mul(), inputs, output, factors={0: self.alpha})


@LOWERINGS.register("mul")
def lower_mul(context: LayerContext) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactMul(context), context.output) if context.integer else lower_float(context)
