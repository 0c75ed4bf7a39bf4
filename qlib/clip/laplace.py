"""The best clip value for a Laplace distribution."""

from __future__ import annotations

from qlib.clip._aciq import aciq_range, factor
from qlib.clip._base import CLIP_METHODS, ClipContext, need
from qlib.stats.tensor_stats import TensorStats

_ALPHA = {0: 1.05, 1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89}
_ALPHA_HALF = {0: 1.86, 1: 2.83, 2: 3.89, 3: 5.02, 4: 6.2, 5: 7.41, 6: 8.64, 7: 9.89, 8: 11.16}


@CLIP_METHODS.register("laplace", order=4, spread=True)
def laplace(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """The range of least expected error if the values follow a Laplace distribution of scale b = E|x - mean|.

    >>> stats = TensorStats(count=8, samples=2, min=-9.0, max=9.0, avg_min=-8.0, mean=1.0, b=1.0)
    >>> from qlib.quant.spec import QuantSpec
    >>> [laplace(stats, ClipContext(QuantSpec.of_mode(mode, 5))) for mode in ("sym", "asym_u")]
    [(-7.2, 7.2), (-5.2, 7.2)]

    Raises:
        StatsError: the statistics lack b or mean, or avg_min for an asymmetric range.
    """
    return aciq_range(stats, need(stats, "b") * factor(context, _ALPHA, _ALPHA_HALF, solve_alpha), context)


def solve_alpha(bits: int) -> float:
    """The alpha, for b = 1, that minimises 2 exp(-alpha) + alpha^2 / (3 * 4^bits).

    The derivative is zero where alpha * exp(alpha) = 3 * 4^bits, of which Lambert's W is the solution.

    >>> [round(solve_alpha(bits), 2) for bits in (0, 4, 8, 16)]
    [1.05, 5.03, 9.9, 20.27]
    """
    from scipy.special import lambertw

    return float(lambertw(3 * 4.0**bits).real)
