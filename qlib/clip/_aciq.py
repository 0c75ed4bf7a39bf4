"""What `gauss` and `laplace` share: the analytical clipping of ACIQ.

For a tensor of known distribution, the clip value alpha that minimises the expected squared error is a constant for
each bit-width times the distribution's own width. The error is that of values beyond alpha, plus that of rounding
inside: alpha^2 / (3 * 4^bits).

References: Banner, Nahshan, Hoffer, Soudry, "Post-training 4-bit quantization of convolution networks for
rapid-deployment", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlib.clip._base import ClipContext, need
from qlib.stats.tensor_stats import TensorStats


def aciq_range(stats: TensorStats, alpha: float, context: ClipContext) -> tuple[float, float]:
    """The range for a clip value `alpha` > 0, in units of the tensor.

    Symmetric: +-(|mean| + alpha). Else from max(avg_min, mean - alpha) upwards: 2 alpha wide, or alpha for a half
    range. The upper end may lie beyond the largest value seen.

    >>> stats = TensorStats(count=8, samples=2, min=-1.0, max=9.0, avg_min=-0.5, mean=1.0)
    >>> from qlib.quant.spec import QuantSpec
    >>> [aciq_range(stats, 3.0, ClipContext(QuantSpec.of_mode(mode, 8))) for mode in ("sym", "asym_u")]
    [(-4.0, 4.0), (-0.5, 5.5)]
    >>> aciq_range(stats, 3.0, ClipContext(QuantSpec.of_mode("asym_u", 8), half_range=True))
    (-0.5, 2.5)
    """
    mean = need(stats, "mean")
    if context.spec.symmetric:
        return -(abs(mean) + alpha), abs(mean) + alpha
    lo = max(need(stats, "avg_min"), mean - alpha)
    return lo, lo + (alpha if context.half_range else 2 * alpha)


def factor(
    context: ClipContext, table: Mapping[int, float], half_table: Mapping[int, float], solve: Callable[[int], float]
) -> float:
    """alpha in units of the distribution's width: the printed value where there is one, else the solution.

    Half of a distribution on all codes is like the whole of it with one more bit, so the half-range solution is
    `solve(bits + 1)`. A symmetric range has no use for a half.
    """
    half = context.half_range and not context.spec.symmetric
    printed = (half_table if half else table).get(context.spec.bits)
    return solve(context.spec.bits + half) if printed is None else printed
