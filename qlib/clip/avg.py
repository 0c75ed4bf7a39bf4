"""The range of an average sample."""

from __future__ import annotations

from qlib.clip._base import CLIP_METHODS, ClipContext, need
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register("avg", order=1)
def avg(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The means over samples of each sample's own minimum and maximum: (avg_min, avg_max).

    >>> from qlib.quant.spec import QuantSpec
    >>> context = ClipContext(QuantSpec.of_mode("asym_u", 8))
    >>> avg(TensorStats(count=8, samples=2, min=-1.0, max=6.0, avg_min=-0.5, avg_max=4.0), context)
    (-0.5, 4.0)

    Raises:
        StatsError: the statistics lack avg_min or avg_max.
    """
    return need(stats, "avg_min"), need(stats, "avg_max")
