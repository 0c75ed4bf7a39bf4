"""A layer of the exported graph: dequantize what arrives, compute in float, quantize what leaves.

Between layers travel the codes that are deployed: uint8, or uint16 for grids of more than 8 bits. ONNX Runtime
recognizes the pattern and computes it in integers; any other runtime may compute it as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlib.lower.base import ActivationGrid, ActivationGrids
from qlib.lower.onnx_ops import dequantize_linear, quantize_linear

__all__ = ["FromCodes", "QdqLayer", "ToCodes"]


class ToCodes(nn.Module):
    """Float -> codes of a grid, within its bounds.

    Bounds tighter than the type's (a ReLU where the zero point is not 0, fewer than 8 bits) are a Clip of the codes:
    one before quantizing would keep the layer from being computed in integers. `again`: what arrives was dequantized
    just before; it is always clipped, or ONNX Runtime would round once, to a grid that it works out from both.
    """

    def __init__(self, grid: ActivationGrid, *, again: bool = False) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), grid.zero_point
        self.bits = 8 if grid.dtype == torch.uint8 else 16
        low, high = grid.low + grid.zero_point, grid.high + grid.zero_point
        self.bounds = None if (low, high) == (0, 2**self.bits - 1) and not again else (low, high)
        self.real_bounds = grid.low * self.scale, grid.high * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return quantize_linear(x, self.scale, self.zero_point, self.bits)
        if self.bits == 8:
            return torch.clamp(quantize_linear(x, self.scale, self.zero_point, self.bits), *self.bounds)
        # ONNX Runtime has no Clip of uint16, and computes such a layer in float anyway
        return quantize_linear(torch.clamp(x, *self.real_bounds), self.scale, self.zero_point, self.bits)


class FromCodes(nn.Module):
    """Codes of a grid -> float; `factor` multiplies the scale."""

    def __init__(self, grid: ActivationGrid, factor: float = 1.0) -> None:
        super().__init__()
        self.scale, self.zero_point = float(grid.times(factor).scale), grid.zero_point

    def forward(self, codes: Tensor) -> Tensor:
        return dequantize_linear(codes, self.scale, self.zero_point)


class QdqLayer(nn.Module):
    """`op` on the values of its tensor inputs; an input or output without a grid stays as it is.

    `before[i]` moves the codes of input i before they are dequantized, `after` those that leave: between the op and
    its quantize steps a move would keep ONNX Runtime from computing in integers. `factors[i]` multiplies the scale
    of input i.
    """

    def __init__(
        self,
        op: nn.Module,
        inputs: ActivationGrids,
        output: ActivationGrid | None,
        *,
        before: dict[int, nn.Module] | None = None,
        after: nn.Module | None = None,
        factors: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.op, self.after = op, after
        self.before = nn.ModuleDict({str(index): move for index, move in (before or {}).items()})
        grids = {str(index): (grid, (factors or {}).get(index, 1.0)) for index, grid in enumerate(inputs)}
        self.inputs = nn.ModuleDict({key: FromCodes(grid, factor) for key, (grid, factor) in grids.items() if grid})
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
