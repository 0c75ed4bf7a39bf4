"""ONNX operators as torch operators, so that an exported graph holds exactly these and no decomposition of them.

Each computes what the operator of that name computes (https://onnx.ai/onnx/operators); `deploy.export_onnx` translates
them one to one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["dequantize_linear", "global_average_pool", "quantize_linear"]

_LIBRARY = torch.library.Library("qlib", "DEF")  # type: ignore[no-untyped-call]


def _operator(signature: str, compute: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A torch operator; `shape` makes an empty result. (`torch.library.custom_op` takes twice as long to trace.)"""
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, shape, "Meta")  # type: ignore[no-untyped-call]
    operator: Callable[..., Tensor] = getattr(torch.ops.qlib, name)
    return operator


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    return values if values.ndim == 0 else values.view([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``saturate(round(x / scale) + zero_point)``, of the type of `zero_point`; both are scalars.

    >>> quantize_linear(torch.tensor([-9.0, 0.25, 9.0]), torch.tensor(0.5), torch.tensor(5, dtype=torch.uint8))
    tensor([ 0,  5, 23], dtype=torch.uint8)
    """
    info = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / scale) + zero_point.to(torch.int32)
    return codes.clamp(info.min, info.max).to(zero_point.dtype)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """``float(codes - zero_point) * scale``; scale and zero point are scalars, or vectors along `axis`.

    >>> dequantize_linear(torch.tensor([[1], [2]]), torch.tensor([0.5, 2.0]), torch.tensor([0, 1]), 0).tolist()
    [[0.5], [2.0]]
    """
    centered = codes.to(torch.int32) - _along(zero_point.to(torch.int32), codes, axis)
    return centered.float() * _along(scale, codes, axis)


def _average(x: Tensor) -> Tensor:
    """The mean over all axes after the second, which stay with size 1."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


quantize_linear = _operator(
    "quantize_linear(Tensor x, Tensor scale, Tensor zero_point) -> Tensor",
    _quantize,
    lambda x, scale, zero_point: torch.empty_like(x, dtype=zero_point.dtype),
)

dequantize_linear = _operator(
    "dequantize_linear(Tensor codes, Tensor scale, Tensor zero_point, int axis) -> Tensor",
    _dequantize,
    lambda codes, scale, zero_point, axis: torch.empty_like(codes, dtype=torch.float32),
)

global_average_pool = _operator(
    "global_average_pool(Tensor x) -> Tensor",
    _average,
    lambda x: x.new_empty([*x.shape[:2], *[1] * (x.ndim - 2)]),
)
