"""The range of least squared error."""

from __future__ import annotations

from qlib.clip._base import CLIP_METHODS, ClipContext
from qlib.clip._search import best_range
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register("mse", order=7, histogram=True)
def mse(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The range with the least mean of (x - Q(x))^2 over the histogram: never worse than `none`.

    One value in a thousand at 10, the others evenly from 0 to 1: of 4 bits, some are better spent on those others.

    >>> from qlib.quant.spec import QuantSpec
    >>> from qlib.stats.histogram import Histogram
    >>> seen = Histogram(0.0, 0.25, (250, 250, 250, 249, *[0] * 35, 1))
    >>> stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
    >>> low, high = mse(stats, ClipContext(QuantSpec.of_mode("asym_u", 4)))
    >>> low, round(high, 1)
    (0.0, 6.9)

    Raises:
        StatsError: the statistics hold no histogram.
    """
    return best_range(stats, context, 2.0)
