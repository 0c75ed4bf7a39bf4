"""What a clip method is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qlib.errors import StatsError
from qlib.quant.clip_names import CLIP_DEFAULTS, ClipParameters
from qlib.quant.spec import QuantSpec
from qlib.registry import Registry
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats

__all__ = ["CLIP_METHODS", "ClipContext", "ClipMethod", "folded", "need", "need_histogram"]


@dataclass(frozen=True)
class ClipContext:
    """What a method may know of the tensor besides its statistics.

    `spec`: the grid that will cover the range; `half_range`: a ReLU follows, so only values >= 0 matter (a histogram
    is cut already where that is so); `clip_parameters`: the numbers that methods take.
    """

    spec: QuantSpec
    half_range: bool = False
    clip_parameters: ClipParameters = CLIP_DEFAULTS


ClipMethod: TypeAlias = Callable[[TensorStats, ClipContext], tuple[float, float]]
"""(statistics, context) -> (lo, hi), lo <= hi: the range of values that the codes cover; beyond it they saturate."""

CLIP_METHODS: Registry[ClipMethod] = Registry("clip method", "qlib.clip")
"""Facts of a registration: `order`, in which `auto` prefers methods; `histogram`: it needs one; `spread`: it needs std
or b; `parameters`: key in YAML -> fields of `config.clips.ClipParameter`.
"""


def need(stats: TensorStats, field: str) -> float:
    """A field of the statistics that the method cannot do without.

    >>> need(TensorStats(count=1, samples=1, min=0.0, max=1.0, mean=0.5), "mean")
    0.5
    >>> need(TensorStats(count=1, samples=1, min=0.0, max=1.0), "b")
    Traceback (most recent call last):
    qlib.errors.StatsError: the statistics lack 'b', which this clip method needs; collect them again
    """
    value: float | None = getattr(stats, field)
    if value is None:
        raise StatsError(f"the statistics lack {field!r}, which this clip method needs; collect them again")
    return value


def need_histogram(stats: TensorStats) -> Histogram:
    """The histogram of a tensor, for a method that cannot do without.

    >>> need_histogram(TensorStats(count=1, samples=1, min=0.0, max=1.0))
    Traceback (most recent call last):
    qlib.errors.StatsError: the statistics hold no histogram, which this clip method needs; collect them again with \
--qe-calibration and --qe-histograms
    """
    if stats.histogram is None:
        raise StatsError(
            "the statistics hold no histogram, which this clip method needs; collect them again with --qe-calibration"
            " and --qe-histograms"
        )
    return stats.histogram


def folded(histogram: Histogram) -> Histogram:
    """The histogram of magnitudes: bins below 0 fall on those above, exactly.

    >>> folded(Histogram(-2.0, 1.0, (1, 2, 3)))
    Histogram(low=0.0, width=1.0, counts=(5, 1), zeros=0)
    """
    below = max(0, min(-histogram.first, len(histogram.counts)))
    above = Histogram(max(histogram.low, 0.0), histogram.width, histogram.counts[below:] or (0,), histogram.zeros)
    if not below:
        return above
    nearest = -(histogram.first + below)  # the bin of magnitudes where the last one below 0 falls
    mirrored = Histogram(nearest * histogram.width, histogram.width, histogram.counts[:below][::-1])
    return above.merge(mirrored)
