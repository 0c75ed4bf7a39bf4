"""ONNX operators as torch operators, so that an exported graph holds exactly these and no decomposition of them.

Each computes what the operator of that name computes (https://onnx.ai/onnx/operators); `deploy.export_onnx` translates
them one to one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "dequantize_linear",
    "dequantize_stored",
    "global_average_pool",
    "quantize_linear",
    "quantized_type",
]

_LIBRARY = torch.library.Library("qlib", "DEF")  # type: ignore[no-untyped-call]


def _operator(signature: str, compute: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A torch operator; `shape` makes an empty result. (`torch.library.custom_op` takes twice as long to trace.)"""
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, shape, "Meta")  # type: ignore[no-untyped-call]
    operator: Callable[..., Tensor] = getattr(torch.ops.qlib, name)
    return operator


def quantized_type(bits: int) -> torch.dtype:
    """The type of deployed codes."""
    return torch.uint8 if bits == 8 else torch.uint16


def _quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """``saturate(round(x / scale) + zero_point)``, as uint8 or uint16.

    Scale and zero point are plain numbers: as tensors they would take longer to trace than all the rest.

    >>> quantize_linear(torch.tensor([-9.0, 0.25, 9.0]), 0.5, 5, 8)
    tensor([ 0,  5, 23], dtype=torch.uint8)
    """
    codes = torch.round(x / torch.tensor(scale, device=x.device)) + zero_point
    return codes.clamp(0, 2**bits - 1).to(quantized_type(bits))


def _dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """``float(codes - zero_point) * scale``.

    >>> dequantize_linear(torch.tensor([7, 4], dtype=torch.uint8), 0.5, 5)
    tensor([ 1.0000, -0.5000])
    """
    return (codes.to(torch.int32) - zero_point).float() * scale


def _dequantize_stored(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``float(codes - zero_point) * scale``; scale and zero point are scalars, or vectors along the first axis.

    >>> dequantize_stored(torch.tensor([[1], [2]]), torch.tensor([0.5, 2.0]), torch.tensor([0, 1])).tolist()
    [[0.5], [2.0]]
    """
    column = [-1, *[1] * (codes.ndim - 1)] if scale.ndim else []
    return (codes.to(torch.int32) - zero_point.to(torch.int32).view(column)).float() * scale.view(column)


def _average(x: Tensor) -> Tensor:
    """The mean over all axes after the second, which stay with size 1."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


quantize_linear = _operator(
    "quantize_linear(Tensor x, float scale, int zero_point, int bits) -> Tensor",
    _quantize,
    lambda x, scale, zero_point, bits: torch.empty_like(x, dtype=quantized_type(bits)),
)

dequantize_linear = _operator(
    "dequantize_linear(Tensor codes, float scale, int zero_point) -> Tensor",
    _dequantize,
    lambda codes, scale, zero_point: torch.empty_like(codes, dtype=torch.float32),
)

dequantize_stored = _operator(
    "dequantize_stored(Tensor codes, Tensor scale, Tensor zero_point) -> Tensor",
    _dequantize_stored,
    lambda codes, scale, zero_point: torch.empty_like(codes, dtype=torch.float32),
)

global_average_pool = _operator(
    "global_average_pool(Tensor x) -> Tensor",
    _average,
    lambda x: x.new_empty([*x.shape[:2], *[1] * (x.ndim - 2)]),
)
