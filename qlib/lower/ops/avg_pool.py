"""Average pooling over windows, as ONNX Runtime's QLinearAveragePool computes it: in float, zero point inside."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, Edge, Edges, ExactLayer, Grid, Lowered, Site
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactAvgPool"]


class ExactAvgPool(ExactLayer):
    """``sat(rint(avg((q - z_x) * s_x) / s_y + z_y))``."""

    scale: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.output is not None
        (edge,) = site.codes_in()
        self.pool = copy.deepcopy(site.module)
        self.grid = Grid(site.output)
        self.register_buffer("scale", edge.scale, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        y: Tensor = self.pool(codes * self.scale)
        return self.grid.round_inside(y.div_(self.grid.scale))

    def qdq(self, inputs: Edges, output: Edge | None) -> nn.Module:
        """The float layer between dequantize and quantize."""
        return QdqLayer(self.pool, inputs, output)


@LOWERINGS.register("avg_pool")
def lower_avg_pool(site: Site) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactAvgPool(site), site.output) if site.integer else lower_float(site)
