"""Magnitude pruning: the smallest weights, filters or channels of one tensor are removed.

A mask is a bool tensor of the weight's shape, true where a weight is kept. Counts are rounded down, as Distiller's are:
``int(level * numel)`` weights and ``floor(level * n)`` filters or channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_largest", "smallest_channels_mask", "smallest_elements_mask", "smallest_filters_mask"]


def smallest_elements_mask(weight: Tensor, level: float) -> Tensor:
    """The mask without the ``int(level * numel)`` weights of least magnitude (Han et al., 2015).

    >>> smallest_elements_mask(torch.tensor([[0.1, -3.0], [2.0, -0.2]]), 0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    return keep_largest(weight.detach().abs(), int(level * weight.numel()))


def smallest_filters_mask(weight: Tensor, level: float) -> Tensor:
    """The mask without the ``floor(level * n)`` of n filters, slices of axis 0, of least mean magnitude.

    Li et al., "Pruning filters for efficient convnets", 2017.

    >>> smallest_filters_mask(torch.tensor([[0.1, -3.0], [2.0, -0.2]]), 0.5)
    tensor([[ True,  True],
            [False, False]])
    """
    return _smallest_slices_mask(weight, level, axis=0)


def smallest_channels_mask(weight: Tensor, level: float) -> Tensor:
    """The mask without the ``floor(level * n)`` of n input channels, slices of axis 1, of least mean magnitude.

    >>> smallest_channels_mask(torch.tensor([[0.1, -3.0], [2.0, -0.2]]), 0.5)
    tensor([[False,  True],
            [False,  True]])
    """
    return _smallest_slices_mask(weight, level, axis=1)


def keep_largest(scores: Tensor, removed: int) -> Tensor:
    """The mask, of the shape of `scores`, without the `removed` smallest; of equal ones the first are removed.

    Laws: exactly `removed` are false; the mask of fewer keeps what the mask of more keeps.

    >>> keep_largest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2)
    tensor([ True, False,  True, False])
    """
    flat = scores.flatten()
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(removed).values
    mask = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    mask[equal[removed - int((flat < threshold).sum()) :]] = True
    return mask.view(scores.shape)


def _smallest_slices_mask(weight: Tensor, level: float, axis: int) -> Tensor:
    magnitude = weight.detach().abs().movedim(axis, 0).flatten(1).mean(1)
    kept = keep_largest(magnitude, int(level * len(magnitude)))
    shape = [1] * weight.ndim
    shape[axis] = -1
    return kept.view(shape).expand(weight.shape)
