"""OCTAV: the symmetric clip value of least squared error, by Newton's method on the magnitudes."""

from __future__ import annotations

import numpy as np

from qlib.clip._base import CLIP_METHODS, ClipContext, folded, need_histogram
from qlib.stats.tensor_stats import TensorStats


@CLIP_METHODS.register(
    "octav",
    histogram=True,
    parameters={"clip_octav_steps": {"default": 10, "low": 1, "high": 100, "help": "Newton steps of octav"}},
)
def octav(stats: TensorStats, context: ClipContext) -> tuple[float, float]:
    """``s <- sum of |x| > s / (4^-b / 3 * number of |x| <= s + number of |x| > s)``, from ``s = E|x|``.

    References: Sakr et al., "Optimal clipping and magnitude-aware differentiation for improved quantization-aware
    training", 2022, equation 6; of values that are never negative, half the step has a quarter of the error.

    >>> from qlib.quant.spec import QuantSpec
    >>> from qlib.stats.histogram import Histogram
    >>> seen = Histogram(0.0, 0.25, (250, 250, 250, 249, *[0] * 35, 1))
    >>> stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
    >>> [round(octav(stats, ClipContext(QuantSpec.of_mode("asym_u", bits)))[1], 1) for bits in (2, 4, 8)]
    [1.6, 7.5, 9.9]
    """
    magnitudes = folded(need_histogram(stats))
    centers, counts = magnitudes.edges()[:-1] + magnitudes.width / 2, np.array(magnitudes.counts)
    rounding = 4.0**-context.spec.bits / (3 if stats.min < 0 else 12)
    clip = float(centers @ counts / max(counts.sum(), 1))
    for _ in range(int(context.clip_parameters["clip_octav_steps"])):
        above = np.where(centers > clip, counts, 0)
        clip = float(centers @ above / max(rounding * (counts - above).sum() + above.sum(), 1e-30))
    return min(max(-clip, stats.min), stats.max), max(min(clip, stats.max), stats.min)
