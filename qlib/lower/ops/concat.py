"""Concatenation: each input is requantized to the output's grid, as ONNX Runtime's QLinearConcat does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.graph.ops import Concat
from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactConcat"]


class ExactConcat(ExactLayer):
    """``sat(rint(((q - z_x) * s_x) / s_y) + z_y)`` for an input on another grid; codes on the same are copied."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert isinstance(context.module, Concat)
        assert context.output is not None
        self.dim = context.module.dim
        self.grid = Grid(context.output)
        self.count = len(context.inputs)
        for index, grid in enumerate(context.codes_in()):
            inside = context.output.low <= grid.low and grid.high <= context.output.high
            same = grid.params.same_grid(context.output.params) and inside
            self.register_buffer(f"scale_{index}", None if same else grid.scale, persistent=False)

    def forward(self, *tensors: Tensor) -> Tensor:
        parts = []
        for index, codes in enumerate(tensors):
            scale = getattr(self, f"scale_{index}")
            parts.append(codes if scale is None else self.grid((codes * scale).div_(self.grid.scale)))
        return torch.cat(parts, self.dim)

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(Concat(self.dim), inputs, output)


@LOWERINGS.register("concat")
def lower_concat(context: LayerContext) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactConcat(context), context.output) if context.integer else lower_float(context)
