"""What a clip method is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qlib.errors import StatsError
from qlib.registry import Registry
from qlib.stats.tensor_stats import TensorStats

__all__ = ["CLIP_METHODS", "ClipContext", "ClipMethod", "need"]


@dataclass(frozen=True)
class ClipContext:
    """What a method may know of the tensor besides its statistics.

    `bits` of the codes (>= 1); `symmetric`: the range will be made symmetric about 0; `half_range`: a ReLU follows,
    so only values >= 0 matter; `n_stds`: the width for `n_std`, in standard deviations.
    """

    bits: int = 8
    symmetric: bool = False
    half_range: bool = False
    n_stds: float | None = None


ClipMethod: TypeAlias = Callable[[TensorStats, ClipContext], tuple[float, float]]
"""(statistics, context) -> (lo, hi), lo <= hi: the range of values that the codes cover; beyond it they saturate."""

CLIP_METHODS: Registry[ClipMethod] = Registry("clip method")


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
