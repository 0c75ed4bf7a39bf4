"""Matrix product of two activations: integer accumulators, one requantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.graph.ops import MatMul
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
from qlib.quant.affine import approximate_factor, requant_factor

__all__ = ["ExactMatMul"]


class ExactMatMul(ExactLayer):
    """``clamp(rint(float32(acc) * ((alpha * s_a * s_b) / s_y)) + z_y)``; `alpha` is folded into the scale of `a`."""

    factor: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert isinstance(context.module, MatMul)
        assert context.output is not None
        a, b = context.codes_in()
        self.transpose, self.alpha = context.module.transpose, context.module.alpha
        self.magnitude = a.magnitude * b.magnitude
        self.limit = context.accumulator_limit
        self.grid = Grid(context.output)
        factor = requant_factor(a.times(self.alpha).scale, b.scale, context.output.scale)
        if context.plan.scale_approx_bits is not None:
            factor = approximate_factor(factor, context.plan.scale_approx_bits)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = b.transpose(-2, -1) if self.transpose else b
        bound = self.magnitude * a.shape[-1]
        acc = torch.matmul(a, b) if bound < EXACT_LIMIT else torch.matmul(a.double(), b.double()).float()
        if bound >= self.limit:
            acc = acc.clamp_(-self.limit, self.limit - 1)
        return self.grid.forward(acc.mul_(self.factor))

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize; the codes of `b` are transposed, `alpha` is in a scale."""
        before: dict[int, nn.Module] = {1: Transpose()} if self.transpose else {}
        return QdqLayer(MatMul(), inputs, output, before=before, factors={0: self.alpha})


class Transpose(nn.Module):
    """Swaps the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -1)


@LOWERINGS.register("matmul")
def lower_matmul(context: LayerContext) -> Lowered:
    """Exact where both inputs are integer."""
    return (ExactMatMul(context), context.output) if context.integer else lower_float(context)
