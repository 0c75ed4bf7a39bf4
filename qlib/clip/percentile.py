"""The range that holds a share of the values."""

from __future__ import annotations

import numpy as np

from qlib.clip._base import CLIP_METHODS, ClipContext, folded, need_histogram
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register(
    "percentile",
    order=5,
    histogram=True,
    parameters={
        "clip_percentile": {
            "default": 99.99,
            "low": 50,
            "high": 100,
            "open": True,
            "help": "percentile of the values kept by percentile",
            "metavar": "P",
        }
    },
)
def percentile(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """From percentile 100 - P to percentile P, both of the histogram; for a symmetric range, percentile P of |x|.

    >>> from qlib.quant.clip_names import ClipParameters
    >>> seen = Histogram(0.0, 1.0, (60, 20, 10, 5, 3, 2))
    >>> stats = TensorStats(count=100, samples=1, min=0.0, max=6.0, histogram=seen)
    >>> from qlib.quant.spec import QuantSpec
    >>> parameters = ClipParameters({"clip_percentile": 95.0})
    >>> percentile(stats, ClipContext(QuantSpec.of_mode("sym", 8), clip_parameters=parameters))
    (0.0, 4.0)

    Raises:
        StatsError: the statistics hold no histogram.
    """
    histogram, kept = need_histogram(stats), context.clip_parameters["clip_percentile"]
    if kept >= 100:
        return stats.min, stats.max
    share = kept / 100
    if context.spec.symmetric:
        high = quantile(folded(histogram), share)
        low = -high
    else:
        low, high = quantile(histogram, 1 - share), quantile(histogram, share)
    return min(max(low, stats.min), stats.max), max(min(high, stats.max), stats.min)


def quantile(histogram: Histogram, share: float) -> float:
    """The value below which a share of all values lies, evenly spread inside each bin.

    >>> quantile(Histogram(0.0, 2.0, (3, 1)), 0.5), quantile(Histogram(0.0, 2.0, (3, 1), zeros=6), 0.75)
    (1.3333333333333333, 1.0)
    """
    edges = histogram.edges()
    below = np.concatenate([[0.0], np.cumsum(np.array(histogram.counts, dtype=np.float64))])
    at_zero = int(np.searchsorted(edges, 0.0))
    values = np.insert(edges, at_zero, 0.0)
    mass = np.insert(below, at_zero, below[at_zero] if at_zero < len(below) else below[-1])
    mass[at_zero + 1 :] += histogram.zeros
    return float(np.interp(share * mass[-1], mass, values))
