"""Rounding up or down as something that is learned: AdaRound's soft rounding of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.lower.fake import FakeWeight

__all__ = ["SoftRounding", "rectified_sigmoid"]

_STRETCH = 1.2
_SHIFT = -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clamp(1.2 sigmoid(v) - 0.1, 0, 1)``: reaches 0 and 1 (AdaRound, equation 23; Louizos et al. 2018).

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * _STRETCH + _SHIFT).clamp(0, 1)


class SoftRounding(nn.Module):
    """Stands in for a `FakeWeight`: ``clamp(floor(w / s) + h(V), low, high) * s`` with V to be learned.

    V starts where the weight is what it was in float. What is 0 stays 0, as it may be pruned. With `hard`, h is 0 or
    1: a code next to the weight.
    """

    def __init__(self, rounding: FakeWeight, weight: Tensor) -> None:
        super().__init__()
        self.rounding, self.scale, self.hard = rounding, rounding.scale, False
        steps = rounding.swap(weight.detach()) / rounding.scale
        self.register_buffer("floor", steps.floor())
        self.register_buffer("live", steps != 0)
        up = ((steps - self.floor).clamp(0.01, 0.99) - _SHIFT) / _STRETCH
        self.v = nn.Parameter(torch.log(up / (1 - up)))

    floor: Tensor
    live: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight, in the layer's own layout; `weight` itself is not looked at."""
        up = (self.v >= 0).float() if self.hard else rectified_sigmoid(self.v)
        codes = torch.clamp(self.floor + up * self.live, self.rounding.low, self.rounding.high)
        return self.rounding.swap(codes * self.rounding.scale)

    def undecided(self, beta: float) -> Tensor:
        """``sum 1 - |2 h(V) - 1|^beta``: 0 where every rounding is decided (AdaRound, equation 24)."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()
