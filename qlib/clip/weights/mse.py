"""The ranges of weights of least squared error."""

from __future__ import annotations

from torch import Tensor

from qlib.clip.weights._base import WEIGHT_METHODS, Ranges, WeightContext
from qlib.clip.weights._search import best_ranges


@WEIGHT_METHODS.register("mse", order=2)
def mse(rows: Tensor, context: WeightContext) -> Ranges:
    """The range of least squared error of each row, never worse than that of all its values."""
    return best_ranges(rows, context.spec, 2.0)
