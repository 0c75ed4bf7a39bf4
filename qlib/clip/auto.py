"""For each tensor the method that fits it best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlib.clip._base import CLIP_METHODS, ClipContext, need_histogram
from qlib.clip._search import expected_error
from qlib.errors import StatsError
from qlib.stats.tensor_stats import TensorStats

__all__ = ["auto", "choose"]

_NEGLIGIBLE = 0.01


@CLIP_METHODS.register("auto", histogram=True)
def auto(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The range of the method that `choose` names.

    Raises:
        StatsError: the statistics hold no histogram.
    """
    return choose(stats, context)[1]


def choose(stats: TensorStats, context: ClipContext) -> tuple[str, tuple[float, float]]:
    """The name and range of the method with the least expected squared error on the histogram.

    Of methods within 1 % of the least error, the first one by the `order` of their registration. A method that these
    statistics or parameters do not suffice for is left out, and a range is held inside the observed one.

    >>> from qlib.quant.spec import QuantSpec
    >>> from qlib.stats.histogram import Histogram
    >>> seen = Histogram(0.0, 0.25, (250, 250, 250, 249, *[0] * 35, 1))
    >>> stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
    >>> [choose(stats, ClipContext(QuantSpec.of_mode("asym_u", bits)))[0] for bits in (4, 8)]
    ['mse', 'none']

    Raises:
        StatsError: the statistics hold no histogram.
    """
    histogram = need_histogram(stats)
    context = replace(context, half_range=stats.min >= 0)
    ranges: dict[str, tuple[float, float]] = {}
    for name in CLIP_METHODS:
        if name == "auto" or context.clip_parameters.lacks(name):
            continue
        try:
            low, high = CLIP_METHODS[name](stats, context)
        except StatsError:
            continue
        ranges[name] = min(max(low, stats.min), stats.max), max(min(high, stats.max), stats.min)
    lows, highs = np.array(list(ranges.values())).T
    errors = expected_error(histogram, lows, highs, context)
    good = errors <= (1 + _NEGLIGIBLE) * errors.min()
    return next(each for each, is_good in zip(ranges.items(), good, strict=True) if is_good)
