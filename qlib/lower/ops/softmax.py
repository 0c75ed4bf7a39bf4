"""Softmax, as ONNX Runtime's QLinearSoftmax computes it; in float on codes of more than 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactSoftmax", "softmax_table"]


def softmax_table(scale: float, size: int) -> Tensor:
    """``T[i] = exp((i - 255 + shift) * s)`` for 256 differences from the row's maximum, float32 of a float64 value.

    ``shift = max(0, log(FLT_MAX / size) - 5) / s`` keeps the sum of `size` terms below overflow.
    """
    headroom = torch.log(torch.tensor(torch.finfo(torch.float32).max / size, dtype=torch.float32)).item() - 5
    shift = max(0.0, headroom) / scale
    return torch.exp((torch.arange(256, dtype=torch.float64) - 255 + shift) * scale).float()


class ExactSoftmax(ExactLayer):
    """``min(rint((e * floor(1 / s_y)) / S) + z_y, 255)``, ``e = T[q + 255 - max(q)]``, S their running float32 sum."""

    table: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        assert isinstance(context.module, nn.Softmax)
        assert context.module.dim is not None
        (grid,) = context.codes_in()
        self.dim = context.module.dim
        self.grid = Grid(context.output)
        self.scale, self.size = float(grid.scale), 0
        self.steps = float(math.floor(1.0 / float(context.output.scale)))
        self.register_buffer("table", torch.empty(0), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        if codes.shape[self.dim] != self.size:
            self.size = codes.shape[self.dim]
            self.table = softmax_table(self.scale, self.size).to(codes.device)
        index = (codes - codes.amax(self.dim, keepdim=True)).add_(255).long()
        exponentials = self.table[index]
        columns = exponentials.movedim(self.dim, 0).contiguous()
        total = columns[0].clone()
        for column in columns[1:]:  # in order, as the kernel adds: another order rounds differently
            total += column
        return self.grid.forward((exponentials * self.steps).div_(total.unsqueeze(self.dim)))

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(nn.Softmax(self.dim), inputs, output)


@LOWERINGS.register("softmax")
def lower_softmax(context: LayerContext) -> Lowered:
    """Exact for a softmax without a mask, on codes of at most 8 bits; in float otherwise."""
    return (ExactSoftmax(context), context.output) if context.integer else lower_float(context)
