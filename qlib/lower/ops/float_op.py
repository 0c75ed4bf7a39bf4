"""Layers without an integer form: dequantize, compute in float, quantize."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["FloatOp", "lower_float"]

_DTYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


class FloatOp(ExactLayer):
    """``quantize(module(dequantize(inputs)))``; either step is left out where that side is float."""

    BIAS: ClassVar = "module.bias"

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.dtype = _DTYPES[context.plan.float_bits or 32]
        self.module = copy.deepcopy(context.module).to(self.dtype)
        self.grid = Grid(context.output) if context.output is not None else None
        for index, grid in enumerate(context.inputs):
            self.register_buffer(f"scale_{index}", grid.scale if grid is not None else None, persistent=False)

    def forward(self, *args: Any) -> Any:
        index, values = 0, []
        for arg in args:
            value = arg
            if isinstance(arg, Tensor):
                scale = getattr(self, f"scale_{index}")
                value = _in(self.dtype, arg if scale is None else arg * scale)
                index += 1
            values.append(value)
        y = self.module(*values)
        if not isinstance(y, Tensor):
            return y
        y = _in(torch.float32, y)
        return y if self.grid is None else self.grid.quantize(y)

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The same."""
        return QdqLayer(
            self.module if self.dtype == torch.float32 else _InDtype(self.module, self.dtype), inputs, output
        )


class _InDtype(nn.Module):
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any) -> Any:
        y = self.module(*(_in(self.dtype, arg) if isinstance(arg, Tensor) else arg for arg in args))
        return _in(torch.float32, y) if isinstance(y, Tensor) else y


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Real numbers in a type; masks and indices as they are."""
    return x.to(dtype) if x.is_floating_point() else x


@LOWERINGS.register("float_op")
def lower_float(context: LayerContext) -> Lowered:
    """The layer's own module, between dequantize and quantize."""
    return FloatOp(context), context.output
