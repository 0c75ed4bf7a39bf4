"""No clipping of weights: all values."""

from __future__ import annotations

from torch import Tensor

from qlib.clip.weights._base import WEIGHT_METHODS, Ranges, WeightContext


@WEIGHT_METHODS.register("none", order=0)
def none(rows: Tensor, context: WeightContext) -> Ranges:
    """All values."""
    return rows.amin(1), rows.amax(1)
