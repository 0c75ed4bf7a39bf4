"""The sums from which the statistics of tensors follow; those of more images are added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """Sums over all elements seen of each of E tensors ``[E]``, in float64, with a running pivot p.

    Law: `add` merges the sums of two sets of images; up to rounding, the statistics do not depend on the order.

    `reference` is the mean of the first batch: s1 = sum(x - r) and s2 = sum((x - r)^2) do not cancel.
    `absolute` = sum|x - p|, `sign` = sum sgn(x - p), `sign_pivot` = sum p sgn(x - p). `samples` images were measured
    of the `consumed` ones that the data set was asked for (corrupt ones are left out).
    """

    min: Tensor
    max: Tensor
    avg_min: Tensor
    avg_max: Tensor
    reference: Tensor
    s1: Tensor
    s2: Tensor
    absolute: Tensor
    sign: Tensor
    sign_pivot: Tensor
    count: Tensor
    samples: Tensor
    consumed: Tensor

    @property
    def mean(self) -> Tensor:
        return self.reference + self.s1 / self.count

    @property
    def is_offset(self) -> Tensor:
        """Where the mean is so far from 0 that float32 sums of squares need an origin near it."""
        variance = self.s2 / self.count - (self.s1 / self.count).square()
        return self.mean.square() > 16 * variance

    def add(self, batch: Sums) -> Sums:
        """The sums of both; the reference of `self` stays."""
        shift = batch.reference - self.reference
        sums = {
            name: getattr(self, name) + getattr(batch, name)
            for name in ("avg_min", "avg_max", "absolute", "sign", "sign_pivot", "count", "samples", "consumed")
        }
        return Sums(
            min=torch.minimum(self.min, batch.min),
            max=torch.maximum(self.max, batch.max),
            reference=self.reference,
            s1=self.s1 + batch.s1 + batch.count * shift,
            s2=self.s2 + batch.s2 + shift * (2 * batch.s1 + batch.count * shift),
            **sums,
        )
