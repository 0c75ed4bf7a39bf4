"""The range whose codes lose the least information: TensorRT's entropy calibration.

References: Migacz, "8-bit inference with TensorRT", GTC 2017, pages 25 to 40 and the pseudocode there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy

from qlib.clip._base import CLIP_METHODS, ClipContext, folded, need_histogram
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats

__all__ = ["divergences", "kl"]

Index = npt.NDArray[np.int64]


@CLIP_METHODS.register("kl", order=6, histogram=True)
def kl(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The window of the histogram with the least `divergences` between its values and what codes make of them.

    A symmetric range is that of |x|, with as many levels as it has codes above 0; an asymmetric one of both signs
    shrinks at both ends alike. A window with fewer bins than levels loses nothing, so that none is tried: with many
    bits the whole range is kept. Values that an activation function made 0 lose nothing and do not count.

    >>> seen = Histogram(0.0, 0.25, (400, 300, 200, 99, *[0] * 35, 1))
    >>> stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
    >>> from qlib.quant.spec import QuantSpec
    >>> [kl(stats, ClipContext(QuantSpec.of_mode("asym_u", bits))) for bits in (2, 8)]
    [(0.0, 1.0), (0.0, 10.0)]

    Raises:
        StatsError: the statistics hold no histogram.
    """
    histogram = _with_zero(need_histogram(stats))
    if context.spec.symmetric:
        histogram = folded(histogram)
    left = -histogram.first
    right = len(histogram.counts) - left
    levels = 2 ** (context.spec.bits - context.spec.symmetric)
    tried = np.arange(1, max(left, right) + 1)
    starts, ends = left - -(-tried * left // len(tried)), left - (-tried * right // len(tried))
    wide = ends - starts >= levels
    if not wide.any():
        return stats.min, stats.max
    starts, ends = starts[wide], ends[wide]
    losses = divergences(np.array(histogram.counts), starts, ends, levels)
    best = int(np.argmin(losses))
    edges = histogram.edges()
    low, high = float(edges[starts[best]]), float(edges[ends[best]])
    low = -high if context.spec.symmetric else low
    return min(max(low, stats.min), stats.max), max(min(high, stats.max), stats.min)


def divergences(counts: Index, starts: Index, ends: Index, levels: int) -> npt.NDArray[np.float64]:
    """KL(P || Q) for each window of bins ``starts[i] .. ends[i] - 1``, of at least `levels` bins.

    P is the window, with the values beyond it added to its first and last bin. Q is the window alone, its bins dealt
    to the levels in turn, each level's values spread evenly over those of its bins that are not empty. A bin that is
    empty but for what was added has no counterpart in Q: the divergence is infinite.

    With the sums S_l and non-empty bins N_l of level l, ``sum P log Q = sum_l P_l log(S_l / (N_l sum S))``: prefix sums
    of the histogram serve all windows at once.

    Two levels for four bins, nothing outside: ``P = (1, 3, 2, 2) / 8``, ``Q = (2, 2, 2, 2) / 8``.

    >>> divergences(np.array([1, 3, 2, 2]), np.array([0]), np.array([4]), 2)
    array([0.06540602])
    """
    whole = float(counts.sum())
    if not whole:
        return np.zeros(len(starts))
    sums, filled, entropy = (_prefix(each) for each in (counts, counts > 0, xlogy(counts, counts)))
    sizes = ends - starts
    bounds = starts[:, None] - (-np.arange(levels + 1)[None, :] * sizes[:, None]) // levels
    in_level, bins = np.diff(sums[bounds]), np.diff(filled[bounds])
    added_left, added_right = sums[starts], whole - sums[ends]
    first, last = (counts[each].astype(np.float64) for each in (starts, ends - 1))
    inside = sums[ends] - sums[starts]
    mass = in_level.copy()
    mass[:, 0] += added_left
    mass[:, -1] += added_right
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(in_level) - np.log(bins) - np.log(inside)[:, None]
        cross = np.where(mass > 0, mass * log_q, 0.0).sum(1)
    own = entropy[ends] - entropy[starts]
    for edge, added in ((first, added_left), (last, added_right)):
        own += xlogy(edge + added, edge + added) - xlogy(edge, edge)
    loss = (own - cross) / whole - np.log(whole)
    lost = ((added_left > 0) & (first == 0)) | ((added_right > 0) & (last == 0)) | (inside == 0)
    return np.where(lost, np.inf, loss)


def _prefix(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """``[sum of the first i values for i in 0 .. n]``."""
    return np.concatenate([[0.0], np.cumsum(values.astype(np.float64))])


def _with_zero(histogram: Histogram) -> Histogram:
    """The histogram with bins down or up to 0, which every range holds."""
    return histogram.merge(Histogram(0.0, histogram.width, (0,)))
