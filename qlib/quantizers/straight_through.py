"""Straight-through estimators: what stands for the derivative of a rounding, which is zero almost everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clipped", "identity", "round_stochastic", "rounded"]


def identity(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`.

    References: Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.

    >>> x = torch.tensor([0.4, 2.6], requires_grad=True)
    >>> identity(x, x.round()).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    return x + (rounded - x).detach()


def clipped(x: Tensor, rounded: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """`rounded`, with the gradient of `x` within the bounds and none beyond: that of a hard tanh.

    References: Hubara et al., "Binarized neural networks", 2016, section 2.3.

    >>> x = torch.tensor([0.4, 2.6], requires_grad=True)
    >>> clipped(x, x.sign()).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    bounded = x.clamp(low, high)
    return bounded + (rounded - bounded).detach()


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
