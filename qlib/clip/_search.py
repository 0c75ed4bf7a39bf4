"""What `mse`, `lp` and `auto` share: the expected quantization error on a histogram, and the range that has the least.

Values are taken as spread evenly inside each bin, over which the error is integrated exactly. It therefore holds for
scales wider than a bin (few bits) as for narrower ones (many bits), and for what lies beyond the range.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from qlib.clip._base import ClipContext, need_histogram
from qlib.quant.affine import grid_of_range
from qlib.quant.spec import QuantSpec
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats

__all__ = ["best_range", "expected_error"]

Array = npt.NDArray[np.float64]

_SINGLE, _PAIR = 96, 20  # how many shares of an end are tried, of one end or of each of two
_MIN_SHARE = 1 / 64
_ZOOMS, _ZOOM = 2, 9
_COARSE_BINS = 512


def _values_of_grids(lows: Array, highs: Array, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """The scale of each range's grid, and the smallest and largest value on it."""
    scale, zero_point = (
        each.double().numpy() for each in grid_of_range(torch.from_numpy(lows), torch.from_numpy(highs), spec)
    )
    return scale, (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale


def expected_error(histogram: Histogram, lows: Array, highs: Array, context: ClipContext, p: float = 2.0) -> Array:
    """The mean of ``|x - Q(x)|^p`` over the histogram, for each range ``[lows[i], highs[i]]``.

    With the distance d to the nearest value of the grid, the integral of ``d^p`` up to x is, inside the range,
    ``s^(p+1) * (n * 2 (1/2)^(p+1) + sgn(r) |r|^(p+1)) / (p+1)`` for ``x / s = n + r`` with the scale s and the nearest
    integer n; and it grows by ``(x - end)^(p+1) / (p+1)`` beyond an end.

    Evenly spread values on a grid of scale 1 have the mean squared error 1/12:

    >>> flat = Histogram(0.0, 1.0, (1,) * 255)
    >>> context = ClipContext(QuantSpec.of_mode("asym_u", 8))
    >>> round(float(expected_error(flat, np.array([0.0]), np.array([255.0]), context)[0]), 6)
    0.083333
    """
    total = sum(histogram.counts) + histogram.zeros
    if not total:
        return np.zeros(len(lows))
    scale, lowest, highest = (each[:, None] for each in _values_of_grids(lows, highs, context.spec))
    edges = histogram.edges()[None, :]
    inside = np.clip(edges, lowest, highest)
    beyond = edges - inside
    inside /= scale
    whole = np.round(inside)
    inside -= whole
    integral = _signed_power(inside, p + 1)
    integral += whole * (2 * 0.5 ** (p + 1))
    integral *= scale ** (p + 1)
    integral += _signed_power(beyond, p + 1)
    error: Array = np.diff(integral, axis=1) @ np.array(histogram.counts, dtype=np.float64)
    return np.maximum(error, 0.0) / ((p + 1) * histogram.width * total)


def _signed_power(x: Array, power: float) -> Array:
    """``sgn(x) |x|^power``."""
    if power == 2:
        return x * np.abs(x)
    if power == 3:
        return x * x * x
    return np.copysign(np.abs(x) ** power, x)


def best_range(stats: TensorStats, context: ClipContext, p: float) -> tuple[float, float]:
    """The range of least `expected_error`, among shares of the observed one; never worse than the observed one.

    Shares of each end that lies away from 0 are tried, 1/64 to 1 in equal ratios; then finer ones about the best.

    Raises:
        StatsError: the statistics hold no histogram.
    """
    histogram = need_histogram(stats)
    low, high = min(stats.min, 0.0), max(stats.max, 0.0)
    if context.spec.symmetric:
        high = max(-low, high)
        low = -high
    pairs = bool(low and high) and not context.spec.symmetric
    shares = np.geomspace(_MIN_SHARE, 1.0, _PAIR if pairs else _SINGLE)
    ratio = float(shares[1] / shares[0])

    def best(low_shares: Array, high_shares: Array, on: Histogram) -> tuple[float, float]:
        """The shares of least error; the full ones are among those compared."""
        if pairs:
            low_shares, high_shares = (each.ravel() for each in np.meshgrid(low_shares, high_shares))
        low_shares, high_shares = (np.append(each, 1.0) for each in (low_shares, high_shares))
        errors = expected_error(on, low * low_shares, high * high_shares, context, p)
        least = int(np.argmin(errors[::-1]))  # of equals the last, so that nothing is cut without need
        return float(low_shares[::-1][least]), float(high_shares[::-1][least])

    found = best(shares, shares, _coarser(histogram) if pairs else histogram)
    for _ in range(_ZOOMS):
        around = ratio ** np.linspace(-1, 1, _ZOOM)
        found = best(np.minimum(found[0] * around, 1.0), np.minimum(found[1] * around, 1.0), histogram)
        ratio **= 2 / (_ZOOM - 1)
    return min(max(low * found[0], stats.min), stats.max), max(min(high * found[1], stats.max), stats.min)


def _coarser(histogram: Histogram) -> Histogram:
    """The same counts in at most `_COARSE_BINS` bins, or one more."""
    while len(histogram.counts) > _COARSE_BINS + 1:
        histogram = histogram.merge(Histogram(0.0, histogram.width * 2, (0,)))
    return histogram
