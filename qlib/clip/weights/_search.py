"""What `mse` and `lp` share: the range of least error of each row of a weight."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from qlib.clip.weights._base import Ranges, rounding_error
from qlib.quant.spec import QuantSpec

__all__ = ["best_ranges"]

_MAX_VALUES = 2**21
_MIN_PER_ROW = 1024


def best_ranges(rows: Tensor, spec: QuantSpec, p: float) -> Ranges:
    """The ranges of least ``sum |w - Q(w)|^p``, among shares of those of the values.

    Shares of both ends together are tried, then finer ones, then (on an asymmetric grid) of each end alone. Of a large
    weight evenly spaced values are looked at; the result is compared with the whole range on all values.
    """
    lowest, highest = rows.amin(1), rows.amax(1)
    stride = max(1, rows.shape[1] // max(_MIN_PER_ROW, _MAX_VALUES // len(rows)))
    seen = rows[:, ::stride].contiguous()
    shares = [torch.ones(len(rows)), torch.ones(len(rows))]
    best = rounding_error(seen, lowest, highest, spec, p)

    def attempt(ends: Iterable[int], factors: Iterable[float]) -> None:
        """Multiplies the shares of `ends` by each factor, and keeps for each row what has the least error."""
        nonlocal best
        start = [share.clone() for share in shares]
        for factor in factors:
            tried = [(start[end] * factor).clamp(max=1.0) if end in ends else start[end] for end in (0, 1)]
            error = rounding_error(seen, lowest * tried[0], highest * tried[1], spec, p)
            better = error < best
            best = torch.where(better, error, best)
            for end in ends:
                shares[end] = torch.where(better, tried[end], shares[end])

    coarse = np.geomspace(1 / 16, 1.0, 40)
    ratio = float(coarse[1] / coarse[0])
    attempt((0, 1), coarse)
    attempt((0, 1), ratio ** np.linspace(-1, 1, 9))
    if not spec.symmetric and bool(((lowest < 0) & (highest > 0)).any()):
        for reach in (4.0, 1.0):
            for end in (0, 1):
                attempt((end,), ratio ** np.linspace(-reach, reach, 13))
    low, high = lowest * shares[0], highest * shares[1]
    if spec.symmetric:  # the end that does not decide stays inside the values
        low, high = torch.maximum(low, lowest), torch.minimum(high, highest)
    worse = rounding_error(rows, low, high, spec, p) > rounding_error(rows, lowest, highest, spec, p)
    return torch.where(worse, lowest, low), torch.where(worse, highest, high)
