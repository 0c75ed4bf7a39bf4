"""The statistics of one activation tensor over a dataset, and of a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qlib.stats.histogram import Histogram

__all__ = ["EMPTY", "LayerStats", "ModelStats", "TensorStats"]


@dataclass(frozen=True)
class TensorStats:
    """Range and moments of a tensor, over all elements of all samples seen.

    `min`, `max` are over elements; `avg_min`, `avg_max` are means over samples of the sample's own min and max;
    `std` is the population standard deviation; `b` = E|x - mean|. A value that a file did not hold is None.
    `histogram` is of all values or, of a large tensor, of a part of them; it reaches from `min` to `max` all the same.
    `shape` is that of the first batch, `samples` the number of samples and `count` the number of elements.

    Laws: `merge` is associative and commutative with `EMPTY` as identity: the statistics of two halves
    merge into those of the whole (`b` to second order in the difference of the halves' means, see `merge`).
    """

    count: int
    samples: int
    min: float
    max: float
    avg_min: float | None = None
    avg_max: float | None = None
    mean: float | None = None
    std: float | None = None
    b: float | None = None
    shape: tuple[int, ...] = ()
    histogram: Histogram | None = None

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of the union of two disjoint sets of samples.

        Mean and variance by the pairwise formula (Chan, Golub, LeVeque 1979). `b` is the weighted mean of the
        halves' own `b`: the first-order effect of the shift of the mean cancels between them.

        >>> a = TensorStats(count=2, samples=1, min=0., max=2., avg_min=0., avg_max=2., mean=1., std=1., b=1.)
        >>> c = TensorStats(count=2, samples=1, min=1., max=3., avg_min=1., avg_max=3., mean=2., std=1., b=1.)
        >>> m = a.merge(c)
        >>> m.min, m.max, m.avg_max, m.mean, round(m.std**2, 12)
        (0.0, 3.0, 2.5, 1.5, 1.25)
        """
        if not self.count or not other.count:
            return other if not self.count else self
        count, samples = self.count + other.count, self.samples + other.samples

        def blend(a: float | None, b: float | None, wa: int, wb: int) -> float | None:
            return None if a is None or b is None else (a * wa + b * wb) / (wa + wb)

        spread = None
        known = (self.mean, other.mean, self.std, other.std)
        moments = [moment for moment in known if moment is not None]
        if len(moments) == len(known):
            mean, other_mean, std, other_std = moments
            within = std**2 * self.count + other_std**2 * other.count
            between = (mean - other_mean) ** 2 * self.count * other.count / count
            spread = math.sqrt((within + between) / count)
        return TensorStats(
            count=count,
            samples=samples,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
            avg_min=blend(self.avg_min, other.avg_min, self.samples, other.samples),
            avg_max=blend(self.avg_max, other.avg_max, self.samples, other.samples),
            mean=blend(self.mean, other.mean, self.count, other.count),
            std=spread,
            b=blend(self.b, other.b, self.count, other.count),
            shape=self.shape,
            histogram=_merged(self.histogram, other.histogram),
        )


def _merged(one: Histogram | None, other: Histogram | None) -> Histogram | None:
    return None if one is None or other is None else one.merge(other)


EMPTY = TensorStats(count=0, samples=0, min=math.inf, max=-math.inf)
"""The identity of `TensorStats.merge`."""


@dataclass(frozen=True)
class LayerStats:
    """The statistics of one layer: one record for each tensor input, and one for its output."""

    inputs: tuple[TensorStats, ...]
    output: TensorStats


@dataclass(frozen=True)
class ModelStats:
    """Layer name -> statistics, and what they were collected on.

    `fingerprint` holds `arch`, `weights` (a hash), `dataset`, `split`, `samples`; it is empty for a file of Distiller.
    """

    layers: Mapping[str, LayerStats]
    fingerprint: Mapping[str, str | int] = field(default_factory=dict)
