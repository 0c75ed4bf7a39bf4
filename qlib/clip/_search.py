"""What `mse`, `lp` and `auto` share: the expected quantization error on a histogram, and the range that has the least.

Values are taken as spread evenly inside each bin, over which the error is integrated exactly. It therefore holds for
steps wider than a bin (few bits) as for narrower ones (many bits), and for what lies beyond the range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlib.clip._base import ClipContext, need_histogram
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats

__all__ = ["best_range", "expected_error", "grid_of"]

Array = npt.NDArray[np.float64]

_SINGLE, _PAIR = 96, 20  # how many shares of an end are tried, of one end or of each of two
_LEAST_SHARE = 1 / 64
_ZOOMS, _ZOOM = 2, 9
_COARSE_BINS = 512


@dataclass(frozen=True)
class _Grid:
    """The values ``k * step`` from `low` to `high`; one entry for each candidate range."""

    step: Array
    low: Array
    high: Array


def grid_of(lows: Array, highs: Array, context: ClipContext) -> _Grid:
    """The grids of ranges, as `quant.affine.qparams_from_range` makes them.

    >>> grid = grid_of(np.array([-2.0]), np.array([10.0]), ClipContext(bits=2))
    >>> grid.step, grid.low, grid.high
    (array([4.]), array([-0.]), array([12.]))
    """
    steps = 2**context.bits - 1
    if context.symmetric:
        step = np.maximum(np.abs(lows), np.abs(highs)) / ((steps - context.restricted) / 2)
    else:
        lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
        step = (highs - lows) / steps
    if context.pow2:
        mantissa, exponent = np.frexp(step)
        step = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    step = np.where(step > 0, step, 1.0)
    if context.symmetric:
        top = 2 ** (context.bits - 1) - 1
        return _Grid(step, -(top + 1 - context.restricted) * step, top * step)
    zero_point = np.clip(np.round(-lows / step), 0, steps)
    return _Grid(step, -zero_point * step, (steps - zero_point) * step)


def expected_error(histogram: Histogram, lows: Array, highs: Array, context: ClipContext, p: float = 2.0) -> Array:
    """The mean of ``|x - Q(x)|^p`` over the histogram, for each range ``[lows[i], highs[i]]``.

    With the distance d to the nearest value of the grid, the integral of ``d^p`` up to x is, inside the range,
    ``step^(p+1) * (n * 2 (1/2)^(p+1) + sgn(r) |r|^(p+1)) / (p+1)`` for ``x / step = n + r``, n the nearest integer; and
    it grows by ``(x - end)^(p+1) / (p+1)`` beyond an end.

    Evenly spread values between steps of 1 have the mean squared error 1/12:

    >>> flat = Histogram(0.0, 1.0, (1,) * 255)
    >>> round(float(expected_error(flat, np.array([0.0]), np.array([255.0]), ClipContext())[0]), 6)
    0.083333
    """
    total = sum(histogram.counts) + histogram.zeros
    if not total:
        return np.zeros(len(lows))
    grid = grid_of(lows, highs, context)
    step = grid.step[:, None]
    edges = histogram.edges()[None, :]
    inside = np.clip(edges, grid.low[:, None], grid.high[:, None])
    beyond = edges - inside
    inside /= step
    whole = np.round(inside)
    inside -= whole
    integral = _signed_power(inside, p + 1)
    integral += whole * (2 * 0.5 ** (p + 1))
    integral *= step ** (p + 1)
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
    if context.symmetric:
        high = max(-low, high)
        low = -high
    pairs = bool(low and high) and not context.symmetric
    shares = np.geomspace(_LEAST_SHARE, 1.0, _PAIR if pairs else _SINGLE)
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
