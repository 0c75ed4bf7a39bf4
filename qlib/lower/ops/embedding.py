"""Embedding: a table of codes; the output is on the table's grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.quant.affine import quantize

__all__ = ["ExactEmbedding"]


class ExactEmbedding(ExactLayer):
    """Looks up centered codes, quantized per tensor; leaves in float unless the next layer takes codes."""

    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        plan = context.plan.weight
        assert plan is not None
        assert isinstance(context.module, nn.Embedding)
        weight = context.module.weight.detach()
        params = plan.qparams(weight)
        codes = quantize(weight, params) - params.zero_point
        self.table_grid = ActivationGrid.of(params)
        self.register_buffer("weight_codes", codes.to(torch.int16 if plan.spec.bits < 16 else torch.int32))
        self.register_buffer("weight_scale", params.scale)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that may stand in each tensor of the state that the plan bounds."""
        spec = self.table_grid.params.spec
        reach = spec.qmax - spec.qmin  # of centered codes, whatever the zero point was
        codes = (spec.qmin, spec.qmax) if spec.symmetric else (-reach, reach)
        return {
            "weight_codes": codes,
            "weight_scale": (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max),
        }

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight_codes).float() * self.weight_scale

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The same: centered codes are looked up, then dequantized."""
        return self


@LOWERINGS.register("embedding")
def lower_embedding(context: LayerContext) -> Lowered:
    """Codes of the table, dequantized as they are looked up."""
    return lower_float(context) if context.plan.weight is None else (ExactEmbedding(context), None)
