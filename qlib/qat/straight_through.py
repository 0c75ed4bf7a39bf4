"""Straight-through estimators: what stands for the derivative of a rounding, which is zero almost everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["held", "identity"]


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def identity(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `x`.

    References: Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.

    >>> x = torch.tensor([0.4, 2.6], requires_grad=True)
    >>> identity(x, x.round()).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    y: Tensor = _Identity.apply(x, rounded)
    return y


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(x, bound)
        return torch.minimum(torch.maximum(x, -bound), bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (x, bound) = grads, ctx.saved_tensors
        outwards = (x.abs() >= bound) & (x * grad < 0)
        return grad.masked_fill(outwards, 0.0), None


def held(x: Tensor, bound: Tensor) -> Tensor:
    """`x` clipped to ``[-bound, bound]``; beyond, the gradient passes that makes a step of descent lead back.

    It stands for clipping a parameter after each step. Unlike where no gradient passes beyond the bounds (a hard tanh:
    Hubara et al., "Binarized neural networks", 2016, section 2.3), a parameter that has left them can return.

    >>> x = torch.tensor([-3.0, 0.5, 3.0, 3.0], requires_grad=True)
    >>> (held(x, torch.tensor(1.0)) * torch.tensor([1.0, 1.0, 1.0, -1.0])).sum().backward()
    >>> x.grad
    tensor([0., 1., 1., 0.])
    """
    y: Tensor = _Held.apply(x, bound)
    return y
