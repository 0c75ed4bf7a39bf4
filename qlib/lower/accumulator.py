"""How large the accumulators of a weighted layer can become, and sums that stay exact in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlib.lower.base import EXACT_LIMIT, ActivationGrid

__all__ = ["accumulator_bounds", "rounded_sum", "split_points"]


def rounded_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of integer tensors, rounded once, to float32; the first may be overwritten.

    >>> rounded_sum([torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([1.0])]).item() - 2**24
    2.0
    """
    if len(parts) == 1:
        return parts[0].float()
    if len(parts) == 2 and parts[0].dtype == parts[1].dtype == torch.float32:
        return parts[0].add_(parts[1])
    return torch.stack([part.double() for part in parts]).sum(0).float()


def accumulator_bounds(weight: Tensor, bias: Tensor | None, grid: ActivationGrid, *, by_channel: bool) -> Tensor:
    """``[in_channels, out_channels]``: how far each input channel can move each accumulator (the bias is in the first).

    `weight` is centered, ``[out, in / groups, ...]``. With ``p`` and ``n`` the sums of the positive and negative
    weights, any partial sum over codes ``low .. high`` stays within ``max(p * high - n * low, n * high - p * low)``.
    One row for all input channels together where `by_channel` is false.

    >>> from qlib.quant.plan import TensorPlan
    >>> from qlib.quant.spec import QuantSpec
    >>> grid = ActivationGrid.of(TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=25.5).qparams())
    >>> accumulator_bounds(torch.tensor([[2.0, -3.0]]), None, grid, by_channel=False)
    tensor([[765.]], dtype=torch.float64)
    """
    if by_channel and weight.ndim == 2:  # one weight each: either sum is 0
        bounds = weight.abs().T.double() * grid.magnitude
    else:
        w = weight.flatten(2) if by_channel else weight.flatten(1)[:, None]
        total, size = w.sum(-1, dtype=torch.float64), w.abs().sum(-1, dtype=torch.float64)
        positive, negative = (size + total) / 2, (size - total) / 2
        up, down = positive * grid.high - negative * grid.low, negative * grid.high - positive * grid.low
        bounds = torch.maximum(up, down).T.contiguous()
    if bias is not None:
        bounds[0] += bias.double().abs()
    return bounds


def split_points(bounds: Tensor) -> list[int] | None:
    """Where to cut the input channels so that each part's accumulators stay below 2^24; None where it can't be done.

    >>> split_points(torch.tensor([[9e6], [9e6], [5e6]]))
    [1]
    """
    running = torch.zeros_like(bounds[0])
    cuts: list[int] = []
    if float(bounds.sum(0).max()) < EXACT_LIMIT:
        return cuts
    if float(bounds.max()) >= EXACT_LIMIT:
        return None
    for channel in range(bounds.shape[0]):
        running = running + bounds[channel]
        if float(running.max()) >= EXACT_LIMIT:
            cuts.append(channel)
            running = bounds[channel]
    return cuts
