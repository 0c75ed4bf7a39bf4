"""A layer of the exported graph: dequantize what arrives, compute in float, quantize what leaves.

Between layers travel the codes that are deployed: uint8, or uint16 for grids of more than 8 bits. ONNX Runtime
recognizes the pattern and computes it in integers; any other runtime may compute it as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlib.lower.base import Edge, Edges
from qlib.lower.onnx_ops import dequantize_linear, quantize_linear

__all__ = ["FromCodes", "QdqLayer", "ToCodes"]


class ToCodes(nn.Module):
    """Float -> codes of an edge, within its bounds.

    Bounds tighter than the type's (a ReLU where the zero point is not 0, fewer than 8 bits) are a Clip of the codes:
    one before quantizing would keep the layer from being computed in integers. `again`: what arrives was dequantized
    just before; it is always clipped, or ONNX Runtime would round once, to a grid that it works out from both.
    """

    def __init__(self, edge: Edge, *, again: bool = False) -> None:
        super().__init__()
        self.scale, self.zero_point = float(edge.scale), edge.zero_point
        self.bits = 8 if edge.dtype == torch.uint8 else 16
        low, high = edge.low + edge.zero_point, edge.high + edge.zero_point
        self.bounds = None if (low, high) == (0, 2**self.bits - 1) and not again else (low, high)
        self.real_bounds = edge.low * self.scale, edge.high * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return quantize_linear(x, self.scale, self.zero_point, self.bits)
        if self.bits == 8:
            return torch.clamp(quantize_linear(x, self.scale, self.zero_point, self.bits), *self.bounds)
        # ONNX Runtime has no Clip of uint16, and computes such a layer in float anyway
        return quantize_linear(torch.clamp(x, *self.real_bounds), self.scale, self.zero_point, self.bits)


class FromCodes(nn.Module):
    """Codes of an edge -> float; `factor` multiplies the scale."""

    def __init__(self, edge: Edge, factor: float = 1.0) -> None:
        super().__init__()
        self.scale, self.zero_point = float(edge.scale * factor), edge.zero_point

    def forward(self, codes: Tensor) -> Tensor:
        return dequantize_linear(codes, self.scale, self.zero_point)


class QdqLayer(nn.Module):
    """`op` on the values of its tensor inputs; an input or output without an edge stays as it is.

    `before[i]` moves the codes of input i before they are dequantized, `after` those that leave: between the op and
    its quantize steps a move would keep ONNX Runtime from computing in integers. `factors[i]` multiplies the scale
    of input i.
    """

    def __init__(
        self,
        op: nn.Module,
        inputs: Edges,
        output: Edge | None,
        *,
        before: dict[int, nn.Module] | None = None,
        after: nn.Module | None = None,
        factors: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.op, self.after = op, after
        self.before = nn.ModuleDict({str(index): move for index, move in (before or {}).items()})
        edges = {str(index): (edge, (factors or {}).get(index, 1.0)) for index, edge in enumerate(inputs)}
        self.inputs = nn.ModuleDict({key: FromCodes(edge, factor) for key, (edge, factor) in edges.items() if edge})
        self.output = None if output is None else ToCodes(output)

    def forward(self, *args: Any) -> Any:
        values, index = [], 0
        for arg in args:
            value = arg
            if isinstance(arg, Tensor):
                key = str(index)
                value = self.before[key](value) if key in self.before else value
                value = self.inputs[key](value) if key in self.inputs else value
                index += 1
            values.append(value)
        y = self.op(*values)
        if self.output is not None:
            y = self.output(y)
        return y if self.after is None else self.after(y)
