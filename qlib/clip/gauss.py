"""The best clip value for a normal distribution."""

from __future__ import annotations

import math

from qlib.clip._aciq import aciq_range, factor
from qlib.clip._base import CLIP_METHODS, ClipContext, need
from qlib.stats.tensor_stats import TensorStats

_ALPHA = {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
_ALPHA_HALF = {1: 1.71, 2: 2.15, 3: 2.55, 4: 2.93, 5: 3.28, 6: 3.61, 7: 3.92, 8: 4.2}


@CLIP_METHODS.register("gauss", order=3, spread=True)
def gauss(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The range of least expected error if the values follow a normal distribution of deviation std.

    >>> stats = TensorStats(count=8, samples=2, min=-9.0, max=9.0, avg_min=-8.0, mean=1.0, std=2.0)
    >>> from qlib.quant.spec import QuantSpec
    >>> [gauss(stats, ClipContext(QuantSpec.of_mode(mode, 8))) for mode in ("sym", "asym_u")]
    [(-8.84, 8.84), (-6.84, 8.84)]

    Raises:
        StatsError: the statistics lack std or mean, or avg_min for an asymmetric range.
    """
    return aciq_range(stats, need(stats, "std") * factor(context, _ALPHA, _ALPHA_HALF, solve_alpha), context)


def solve_alpha(bits: int) -> float:
    """The alpha, for std = 1, that minimises the expected error

        (alpha^2 + 1) erfc(alpha / sqrt 2) - sqrt(2 / pi) alpha exp(-alpha^2 / 2) + alpha^2 / (3 * 4^bits),

    as the root of its derivative.

    >>> [round(solve_alpha(bits), 2) for bits in (1, 4, 8, 16)]
    [1.24, 2.56, 3.92, 5.94]
    """
    from scipy.optimize import brentq

    def slope(alpha: float) -> float:
        rounding = alpha / (3 * 4.0**bits)
        return alpha * math.erfc(alpha / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2) + rounding

    return float(brentq(slope, 0.0, 16.0, xtol=1e-15))
