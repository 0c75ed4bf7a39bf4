"""Wanda: magnitudes times what they are multiplied with."""

from __future__ import annotations

from torch import Tensor

from qlib.prune.methods._base import PRUNERS, Seen

__all__ = ["wanda"]


@PRUNERS.register("wanda", order=30, scope="row", images=True)
def wanda(weight: Tensor, seen: Seen) -> Tensor:
    """``|w_ij| sqrt(H_jj)``, compared within each output (Sun et al., "A simple and effective pruning approach", 2023).

    >>> import torch
    >>> wanda(torch.tensor([[2.0, 1.0]]), Seen(torch.tensor([[1.0, 0.0], [0.0, 9.0]])))
    tensor([[2., 3.]], dtype=torch.float64)
    """
    return weight.double().abs() * seen.moments.diagonal().clamp_min(0).sqrt()
