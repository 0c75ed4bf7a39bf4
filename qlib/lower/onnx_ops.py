"""ONNX operators as torch operators, so that an exported graph holds exactly these and no decomposition of them.

Each computes what the operator of that name computes (https://onnx.ai/onnx/operators); `deploy.export_onnx` translates
them one to one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize_linear", "global_average_pool", "quantize_linear"]


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    return values if values.ndim == 0 else values.view([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


@torch.library.custom_op("qlib::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``saturate(round(x / scale) + zero_point)``, of the type of `zero_point`; both are scalars.

    >>> quantize_linear(torch.tensor([-9.0, 0.25, 9.0]), torch.tensor(0.5), torch.tensor(5, dtype=torch.uint8))
    tensor([ 0,  5, 23], dtype=torch.uint8)
    """
    info = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / scale) + zero_point.to(torch.int32)
    return codes.clamp(info.min, info.max).to(zero_point.dtype)


@torch.library.custom_op("qlib::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """``float(codes - zero_point) * scale``; scale and zero point are scalars, or vectors along `axis`.

    >>> dequantize_linear(torch.tensor([[1], [2]]), torch.tensor([0.5, 2.0]), torch.tensor([0, 1]), 0).tolist()
    [[0.5], [2.0]]
    """
    centered = codes.to(torch.int32) - _along(zero_point.to(torch.int32), codes, axis)
    return centered.float() * _along(scale, codes, axis)


@torch.library.custom_op("qlib::global_average_pool", mutates_args=())
def global_average_pool(x: Tensor) -> Tensor:
    """The mean over all axes after the second, which stay with size 1."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@global_average_pool.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:2], *[1] * (x.ndim - 2)])
