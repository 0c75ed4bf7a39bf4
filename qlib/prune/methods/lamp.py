"""LAMP: magnitudes that can be compared from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qlib.prune.methods._base import PRUNERS, Seen

__all__ = ["lamp"]


@PRUNERS.register("lamp", order=20, scope="global")
def lamp(weight: Tensor, seen: Seen) -> Tensor:
    """``w^2 / sum v^2`` over all v of the layer that are not smaller (Lee et al., "Layer-adaptive sparsity", 2021).

    The largest weight of each layer scores 1, so that no layer dies.

    >>> lamp(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), Seen(torch.eye(2))) * 14
    tensor([[ 1.0000,  4.3077],
            [ 0.0000, 14.0000]], dtype=torch.float64)
    """
    squares, order = weight.double().square().flatten().sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(rest > 0, squares / rest, 0.0)
    return scores.view_as(weight)
