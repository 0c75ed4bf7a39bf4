"""Clip methods of weights: from the values themselves to the range of the whole tensor, or of each output channel.

One method a file, as in `qlib.clip`, whose names and parameters they share where they do the same.
"""

from qlib.clip.weights._base import WEIGHT_METHODS, WeightContext, rounding_error
from qlib.clip.weights.auto import choose

__all__ = ["WEIGHT_METHODS", "WeightContext", "choose", "rounding_error"]
