"""The ranges of weights of least error in another norm."""

from __future__ import annotations

from torch import Tensor

from qlib.clip.weights._base import WEIGHT_METHODS, Ranges, WeightContext
from qlib.clip.weights._search import best_ranges


@WEIGHT_METHODS.register("lp", order=3)
def lp(rows: Tensor, context: WeightContext) -> Ranges:
    """The range of least ``sum |w - Q(w)|^p`` of each row, never worse than that of all its values."""
    return best_ranges(rows, context.spec, context.clip_parameters["clip_p"])
