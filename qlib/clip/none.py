"""No clipping: all values seen."""

from __future__ import annotations

from qlib.clip._base import CLIP_METHODS, ClipContext
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register("none", order=0)
def none(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The whole range seen: (min, max).

    >>> from qlib.quant.spec import QuantSpec
    >>> context = ClipContext(QuantSpec.of_mode("asym_u", 8))
    >>> none(TensorStats(count=8, samples=2, min=-1.0, max=6.0), context)
    (-1.0, 6.0)
    """
    return stats.min, stats.max
