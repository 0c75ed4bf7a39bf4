"""Magnitude: small weights matter least."""

from __future__ import annotations

from torch import Tensor

from qlib.prune.methods._base import PRUNERS, Seen

__all__ = ["magnitude"]


@PRUNERS.register("magnitude", order=10, scope="layer")
def magnitude(weight: Tensor, seen: Seen) -> Tensor:
    """``|w|`` (Han et al., "Learning both weights and connections", 2015).

    >>> import torch
    >>> magnitude(torch.tensor([[0.5, -2.0]]), Seen(torch.eye(2)))
    tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """
    return weight.double().abs()
