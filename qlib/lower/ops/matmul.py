"""Matrix product of two activations: integer accumulators, one requantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.graph.ops import MatMul
from qlib.lower.base import EXACT_LIMIT, LOWERINGS, Edge, Edges, ExactLayer, Grid, Lowered, Site
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer
from qlib.quant.affine import approximate_factor, requant_factor

__all__ = ["ExactMatMul"]


class ExactMatMul(ExactLayer):
    """``clamp(rint(float32(acc) * ((alpha * s_a * s_b) / s_y)) + z_y)``; `alpha` is folded into the scale of `a`."""

    factor: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert isinstance(site.module, MatMul)
        assert site.output is not None
        a, b = site.codes_in()
        self.transpose, self.alpha = site.module.transpose, site.module.alpha
        self.magnitude = a.magnitude * b.magnitude
        self.limit = site.accumulator_limit
        self.grid = Grid(site.output)
        factor = requant_factor(a.scale * site.module.alpha, b.scale, site.output.scale)
        if site.plan.scale_approx_bits is not None:
            factor = approximate_factor(factor, site.plan.scale_approx_bits)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = b.transpose(-2, -1) if self.transpose else b
        bound = self.magnitude * a.shape[-1]
        acc = torch.matmul(a, b) if bound < EXACT_LIMIT else torch.matmul(a.double(), b.double()).float()
        if bound >= self.limit:
            acc = acc.clamp_(-self.limit, self.limit - 1)
        return self.grid.forward(acc.mul_(self.factor))

    def qdq(self, inputs: Edges, output: Edge | None) -> nn.Module:
        """The float layer between dequantize and quantize; the codes of `b` are transposed, `alpha` is in a scale."""
        before: dict[int, nn.Module] = {1: Transpose()} if self.transpose else {}
        return QdqLayer(MatMul(), inputs, output, before=before, factors={0: self.alpha})


class Transpose(nn.Module):
    """Swaps the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -1)


@LOWERINGS.register("matmul")
def lower_matmul(site: Site) -> Lowered:
    """Exact where both inputs are integer."""
    return (ExactMatMul(site), site.output) if site.integer else lower_float(site)
