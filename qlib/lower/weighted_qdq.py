"""The exported form of weighted layers: weight and bias as the file holds them, between dequantize and quantize."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qlib.lower.apply_weight import ApplyWeight
from qlib.lower.base import ActivationGrid, ActivationGrids
from qlib.lower.onnx_ops import dequantize_stored
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["Stored", "weighted_qdq"]


class _InRows(nn.Module):
    """A linear layer on ``[..., in]`` as one on ``[rows, in]``: of more axes, the exporter makes no Gemm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, codes: Tensor) -> Tensor:
        if codes.ndim == 2:
            return cast(Tensor, self.layer(codes))
        y: Tensor = self.layer(codes.reshape(-1, codes.shape[-1]))
        return y.reshape(-1, *codes.shape[1:-1], y.shape[-1])


class Stored(nn.Module):
    """A tensor as the file holds it: codes that are dequantized along the first axis, or float without a scale."""

    values: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("values", values.detach())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self) -> Tensor:
        if self.scale is None:
            return self.values
        return dequantize_stored(self.values, self.scale, self.zero_point)


class _QdqWeighted(nn.Module):
    """Applies a weight, and a bias, as the file holds them."""

    def __init__(self, apply_weight: ApplyWeight, weight: Stored, bias: Stored | None) -> None:
        super().__init__()
        self.apply_weight, self.weight, self.bias = apply_weight, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.weight(), None if self.bias is None else self.bias())


def weighted_qdq(
    apply_weight: ApplyWeight,
    pad: nn.Module | None,
    weight: Stored,
    bias: Stored | None,
    inputs: ActivationGrids,
    output: ActivationGrid | None,
) -> nn.Module:
    """The exported layer.

    ONNX Runtime quantizes a float weight to 8 bits by itself where the input is dequantized and the bias is a float
    constant or absent; a bias that is dequantized keeps it from that.
    """
    grid = inputs[0]
    if grid is not None and weight.scale is None and (bias is None or bias.scale is None):
        values = torch.zeros(len(weight.values)) if bias is None else bias.values
        codes, scale = _exact_codes(values)
        bias = Stored(codes, scale, torch.zeros_like(codes))
    op: nn.Module = _QdqWeighted(apply_weight, weight, bias)
    before: dict[int, nn.Module] = {}
    if pad is not None and grid is not None and grid.dtype == torch.uint16:
        op = nn.Sequential(pad, op)  # of such codes ONNX Runtime has no padding
    elif pad is not None:
        before = {0: pad}
    layer = QdqLayer(op, inputs, output, before=before)
    return _InRows(layer) if weight.values.ndim == 2 and grid is not None else layer


def _exact_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 values as int32 codes, each with a scale of its own, a power of two: ``codes * scale`` is exact.

    >>> codes, scale = _exact_codes(torch.tensor([0.75, -3.0]))
    >>> codes * 2.0**-24, scale * 2.0**24
    (tensor([ 0.7500, -0.7500]), tensor([1., 4.]))
    """
    _, exponent = torch.frexp(values)
    scale = torch.ldexp(torch.ones_like(values), (exponent - 24).clamp(min=-126))
    return torch.round(values / scale).to(torch.int32), scale
