"""A number of standard deviations about the mean."""

from __future__ import annotations

from qlib.clip._base import CLIP_METHODS, ClipContext, need
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register(
    "n_std",
    order=2,
    spread=True,
    parameters={"clip_n_stds": {"low": 0, "open": True, "help": "standard deviations kept by n_std"}},
)
def n_std(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """mean -+ clip_n_stds * std, held inside [min, max].

    >>> from qlib.quant.clip_names import ClipParameters
    >>> stats = TensorStats(count=8, samples=2, min=-1.0, max=9.0, mean=1.0, std=1.5)
    >>> from qlib.quant.spec import QuantSpec
    >>> context = ClipContext(QuantSpec.of_mode("asym_u", 8), clip_parameters=ClipParameters({"clip_n_stds": 2.0}))
    >>> n_std(stats, context)
    (-1.0, 4.0)

    Both ends are held on both sides: where an activation function narrowed min and max afterwards, the mean can lie
    outside them.

    >>> n_std(TensorStats(count=8, samples=2, min=0.0, max=1.0, mean=-4.0, std=1.5), context)
    (0.0, 0.0)

    Raises:
        StatsError: the statistics lack mean or std.
    """
    mean, reach = need(stats, "mean"), context.clip_parameters["clip_n_stds"] * need(stats, "std")
    lo, hi = mean - reach, mean + reach
    return min(max(lo, stats.min), stats.max), max(min(hi, stats.max), stats.min)
