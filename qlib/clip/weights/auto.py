"""For each weight the method that fits it best."""

from __future__ import annotations

from torch import Tensor

from qlib.clip.weights._base import WEIGHT_METHODS, Ranges, WeightContext, rounding_error

__all__ = ["auto", "choose"]

_NEGLIGIBLE = 0.01


@WEIGHT_METHODS.register("auto")
def auto(rows: Tensor, context: WeightContext) -> Ranges:
    """The ranges of the method that `choose` names."""
    return choose(rows, context)[1]


def choose(rows: Tensor, context: WeightContext) -> tuple[str, Ranges]:
    """The name and ranges of the first method, by its `order`, whose squared error is within 1 % of the least of all.

    A method that lacks a parameter is left out.

    >>> import torch
    >>> from qlib.quant.spec import QuantSpec
    >>> choose(torch.tensor([[-0.5, 0.5]]), WeightContext(QuantSpec.of_mode("sym_restr", 2, axis=0)))[0]
    'none'
    """
    skipped = ["auto", *(["lp"] if context.clip_parameters["clip_p"] == 2 else [])]  # which is mse then
    names = [name for name in WEIGHT_METHODS if name not in skipped and not context.clip_parameters.lacks(name)]
    ranges = {name: WEIGHT_METHODS[name](rows, context) for name in names}
    errors = {name: float(rounding_error(rows, *found, context.spec).sum()) for name, found in ranges.items()}
    best = next(name for name, error in errors.items() if error <= (1 + _NEGLIGIBLE) * min(errors.values()))
    return best, ranges[best]
