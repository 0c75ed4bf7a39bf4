"""Concatenation: each input is requantized to the output's grid, as ONNX Runtime's QLinearConcat does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.graph.ops import Concat
from qlib.lower.base import LOWERINGS, Edge, Edges, ExactLayer, Grid, Lowered, Site
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactConcat"]


class ExactConcat(ExactLayer):
    """``sat(rint(((q - z_x) * s_x) / s_y) + z_y)`` for an input on another grid; codes on the same are copied."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert isinstance(site.module, Concat)
        assert site.output is not None
        self.dim = site.module.dim
        self.grid = Grid(site.output)
        self.count = len(site.inputs)
        for index, edge in enumerate(site.codes_in()):
            inside = site.output.low <= edge.low and edge.high <= site.output.high
            same = edge.params.same_grid(site.output.params) and inside
            self.register_buffer(f"scale_{index}", None if same else edge.scale, persistent=False)

    def forward(self, *tensors: Tensor) -> Tensor:
        parts = []
        for index, codes in enumerate(tensors):
            scale = getattr(self, f"scale_{index}")
            parts.append(codes if scale is None else self.grid((codes * scale).div_(self.grid.scale)))
        return torch.cat(parts, self.dim)

    def qdq(self, inputs: Edges, output: Edge | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(Concat(self.dim), inputs, output)


@LOWERINGS.register("concat")
def lower_concat(site: Site) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactConcat(site), site.output) if site.integer else lower_float(site)
