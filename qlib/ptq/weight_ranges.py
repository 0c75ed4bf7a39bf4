"""Ranges of weights: from a weight and a clip method to its plan."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qlib.clip.weights import WEIGHT_METHODS, WeightContext, choose
from qlib.quant.clip_names import ClipParameters
from qlib.quant.plan import WeightPlan

__all__ = ["plan_weight"]


def plan_weight(plan: WeightPlan, weight: Tensor, method: str, clip_parameters: ClipParameters) -> WeightPlan:
    """The plan with the ranges that `method` gives a weight ``[out, ...]``; as it is where nothing is clipped.

    `auto` is replaced by the method that it chooses.

    >>> import torch
    >>> from qlib.quant.spec import QuantSpec
    >>> weight = torch.tensor([[-0.4, 0.1, 0.2, 0.4, 0.3, -0.1, 0.2, -0.3]])
    >>> plan_weight(WeightPlan(QuantSpec.of_mode("sym", 8)), weight, "auto", ClipParameters()).max is None
    True
    >>> clipped = plan_weight(WeightPlan(QuantSpec.of_mode("sym_restr", 2)), weight, "mse", ClipParameters())
    >>> clipped.clip, round(clipped.max[0], 2)
    ('mse', 0.3)
    """
    values = weight.detach().float().cpu()
    rows = values.flatten(1) if plan.per_channel else values.reshape(1, -1)
    context = WeightContext(replace(plan.spec, axis=0), clip_parameters)
    if method == "none":
        return plan
    if method == "auto":
        method, (low, high) = choose(rows, context)
    else:
        low, high = WEIGHT_METHODS[method](rows, context)
    if method == "none":
        return plan
    return WeightPlan(plan.spec, method, tuple(low.tolist()), tuple(high.tolist()))
