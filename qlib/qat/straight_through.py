"""Straight-through estimators: what stands for the derivative of a rounding, which is zero almost everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["clipped", "held", "identity", "round_stochastic", "rounded"]


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


def clipped(x: Tensor, rounded: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """`rounded`, exactly, with the gradient of `x` within the bounds and none beyond: that of a hard tanh.

    References: Hubara et al., "Binarized neural networks", 2016, section 2.3.

    >>> x = torch.tensor([0.4, 2.6], requires_grad=True)
    >>> clipped(x, x.sign()).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    return identity(x.clamp(low, high), rounded)


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

    It stands for clipping a parameter after each step: unlike with `clipped`, one that has left the bounds can return.

    >>> x = torch.tensor([-3.0, 0.5, 3.0, 3.0], requires_grad=True)
    >>> (held(x, torch.tensor(1.0)) * torch.tensor([1.0, 1.0, 1.0, -1.0])).sum().backward()
    >>> x.grad
    tensor([0., 1., 1., 0.])
    """
    y: Tensor = _Held.apply(x, bound)
    return y


def rounded(x: Tensor) -> Tensor:
    """The nearest integers, straight through."""
    return identity(x, x.detach().round())


def round_stochastic(x: Tensor) -> Tensor:
    """One of the two integers around each number, the nearer the likelier, so that the mean is right; straight through.

    References: Gupta et al., "Deep learning with limited numerical precision", 2015, section 3.

    >>> _ = torch.manual_seed(0)
    >>> round(round_stochastic(torch.full([10000], 0.3)).mean().item(), 1)
    0.3
    """
    return identity(x, (x.detach() + torch.rand_like(x)).floor())
