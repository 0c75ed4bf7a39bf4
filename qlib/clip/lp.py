"""The range of least error in another norm."""

from __future__ import annotations

from qlib.clip._base import CLIP_METHODS, ClipContext
from qlib.clip._search import best_range
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register(
    "lp",
    order=8,
    histogram=True,
    parameters={
        "clip_p": {
            "default": 2.0,
            "low": 1,
            "high": 4,
            "help": "power of the error that lp makes least",
            "metavar": "P",
        }
    },
)
def lp(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The range with the least mean of ``|x - Q(x)|^p`` over the histogram: a large p keeps outliers, a small one cuts.

    References: Nahshan et al., "Loss aware post-training quantization", 2019, section 4.1.

    >>> from qlib.quant.clip_names import ClipParameters
    >>> from qlib.quant.spec import QuantSpec
    >>> from qlib.stats.histogram import Histogram
    >>> seen = Histogram(0.0, 0.25, (250, 250, 250, 249, *[0] * 35, 1))
    >>> stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
    >>> spec, powers = QuantSpec.of_mode("asym_u", 4), [ClipParameters({"clip_p": p}) for p in (1.0, 2.0, 3.0, 4.0)]
    >>> [round(lp(stats, ClipContext(spec, clip_parameters=each))[1], 1) for each in powers]
    [1.0, 6.9, 9.0, 9.3]

    Raises:
        StatsError: the statistics hold no histogram.
    """
    return best_range(stats, context, context.clip_parameters["clip_p"])
