"""Ranges of weights, from the weights themselves: of a whole tensor, or of all output channels at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from qlib.config.layers.clips import CLIP_DEFAULTS, ClipParameters
from qlib.quant.affine import dequantize, qparams_from_range, quantize
from qlib.quant.plan import WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.registry import Registry

__all__ = ["WEIGHT_METHODS", "WeightContext", "plan_weight", "rounding_error"]

_MAX_VALUES = 2**21
_MIN_PER_ROW = 1024
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class WeightContext:
    """What a method may know besides the weight: its number format, per channel, and the numbers that methods take."""

    spec: QuantSpec
    clip_parameters: ClipParameters = CLIP_DEFAULTS


Ranges: TypeAlias = tuple[Tensor, Tensor]
WeightMethod: TypeAlias = Callable[[Tensor, WeightContext], Ranges]
"""(weights ``[rows, values]``, context) -> the ends ``[rows]`` of each row's range, inside that of its values."""

WEIGHT_METHODS: Registry[WeightMethod] = Registry("clip method of weights")


def plan_weight(plan: WeightPlan, weight: Tensor, method: str, clip_parameters: ClipParameters) -> WeightPlan:
    """The plan with the ranges that `method` gives a weight ``[out, ...]``; as it is where nothing is clipped.

    `auto`: the first of none, percentile, mse and lp whose squared error is within 1 % of the least of them.

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
        method, (low, high) = _best(rows, context)
    else:
        low, high = WEIGHT_METHODS[method](rows, context)
    if method == "none":
        return plan
    return WeightPlan(plan.spec, method, tuple(low.tolist()), tuple(high.tolist()))


def _best(rows: Tensor, context: WeightContext) -> tuple[str, Ranges]:
    squares = context.clip_parameters["clip_p"] == 2  # lp is mse then
    names = [name for name in WEIGHT_METHODS if not (name == "lp" and squares)]
    ranges = {name: WEIGHT_METHODS[name](rows, context) for name in names}
    errors = {name: float(rounding_error(rows, *found, context.spec).sum()) for name, found in ranges.items()}
    best = next(name for name, error in errors.items() if error <= (1 + _NEGLIGIBLE) * min(errors.values()))
    return best, ranges[best]


def rounding_error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, p: float = 2.0) -> Tensor:
    """``sum |w - Q(w)|^p`` of each row, on the grid of its range.

    >>> spec = QuantSpec.of_mode("sym_restr", 2, axis=0)
    >>> rounding_error(torch.tensor([[1.0, 0.25]]), torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    tensor([0.0625])
    """
    params = qparams_from_range(low, high, spec)
    difference = dequantize(quantize(rows, params), params).sub_(rows)
    return difference.square_().sum(1) if p == 2 else difference.abs_().pow_(p).sum(1)


@WEIGHT_METHODS.register("none")
def none(rows: Tensor, context: WeightContext) -> Ranges:
    """All values."""
    return rows.amin(1), rows.amax(1)


@WEIGHT_METHODS.register("percentile")
def percentile(rows: Tensor, context: WeightContext) -> Ranges:
    """Percentiles 100 - P and P of each row; for a symmetric grid, percentile P of the magnitudes.

    >>> context = WeightContext(QuantSpec.of_mode("asym_u", 8), ClipParameters({"clip_percentile": 95.0}))
    >>> low, high = percentile(torch.arange(101.0)[None], context)
    >>> low.tolist(), high.tolist()
    ([5.0], [95.0])
    """
    share, values = context.clip_parameters["clip_percentile"] / 100, rows.numpy()
    if context.spec.symmetric:
        high = torch.from_numpy(np.quantile(np.abs(values), share, axis=1)).float()
        low = -high
    else:
        low, high = (torch.from_numpy(each).float() for each in np.quantile(values, (1 - share, share), axis=1))
    lowest, highest = none(rows, context)
    return torch.minimum(torch.maximum(low, lowest), highest), torch.maximum(torch.minimum(high, highest), lowest)


@WEIGHT_METHODS.register("mse")
def mse(rows: Tensor, context: WeightContext) -> Ranges:
    """The range of least squared error of each row, never worse than that of all its values."""
    return _min_error(rows, context.spec, 2.0)


@WEIGHT_METHODS.register("lp")
def lp(rows: Tensor, context: WeightContext) -> Ranges:
    """The range of least ``sum |w - Q(w)|^p`` of each row, never worse than that of all its values."""
    return _min_error(rows, context.spec, context.clip_parameters["clip_p"])


def _min_error(rows: Tensor, spec: QuantSpec, p: float) -> Ranges:
    """Searches shares of both ends together, then finer ones, then (on an asymmetric grid) of each end alone.

    Of a large weight evenly spaced values are looked at; the result is compared with the whole range on all values.
    """
    lowest, highest = rows.amin(1), rows.amax(1)
    stride = max(1, rows.shape[1] // max(_MIN_PER_ROW, _MAX_VALUES // len(rows)))
    seen = rows[:, ::stride].contiguous()
    shares = [torch.ones(len(rows)), torch.ones(len(rows))]
    best = rounding_error(seen, lowest, highest, spec, p)

    def attempt(ends: Iterable[int], factors: Iterable[float]) -> None:
        """Multiplies the shares of `ends` by each factor, and keeps for each row what has the least error."""
        nonlocal best
        start = [share.clone() for share in shares]
        for factor in factors:
            tried = [(start[end] * factor).clamp(max=1.0) if end in ends else start[end] for end in (0, 1)]
            error = rounding_error(seen, lowest * tried[0], highest * tried[1], spec, p)
            better = error < best
            best = torch.where(better, error, best)
            for end in ends:
                shares[end] = torch.where(better, tried[end], shares[end])

    coarse = np.geomspace(1 / 16, 1.0, 40)
    ratio = float(coarse[1] / coarse[0])
    attempt((0, 1), coarse)
    attempt((0, 1), ratio ** np.linspace(-1, 1, 9))
    if not spec.symmetric and bool(((lowest < 0) & (highest > 0)).any()):
        for reach in (4.0, 1.0):
            for end in (0, 1):
                attempt((end,), ratio ** np.linspace(-reach, reach, 13))
    low, high = lowest * shares[0], highest * shares[1]
    if spec.symmetric:  # the end that does not decide stays inside the values
        low, high = torch.maximum(low, lowest), torch.minimum(high, highest)
    worse = rounding_error(rows, low, high, spec, p) > rounding_error(rows, lowest, highest, spec, p)
    return torch.where(worse, lowest, low), torch.where(worse, highest, high)
