"""What a clip method of weights is, the registry of all of them, and the error of a range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from qlib.quant.affine import dequantize, qparams_from_range, quantize
from qlib.quant.clip_names import CLIP_DEFAULTS, ClipParameters
from qlib.quant.spec import QuantSpec
from qlib.registry import Registry

__all__ = ["WEIGHT_METHODS", "Ranges", "WeightContext", "rounding_error"]


@dataclass(frozen=True)
class WeightContext:
    """What a method may know besides the weight: its number format, per channel, and the numbers that methods take."""

    spec: QuantSpec
    clip_parameters: ClipParameters = CLIP_DEFAULTS


Ranges: TypeAlias = tuple[Tensor, Tensor]
WeightMethod: TypeAlias = Callable[[Tensor, WeightContext], Ranges]
"""(weights ``[rows, values]``, context) -> the ends ``[rows]`` of each row's range, inside that of its values."""

WEIGHT_METHODS: Registry[WeightMethod] = Registry("clip method of weights", "qlib.clip.weights")


def rounding_error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, p: float = 2.0) -> Tensor:
    """``sum |w - Q(w)|^p`` of each row, on the grid of its range.

    >>> import torch
    >>> spec = QuantSpec.of_mode("sym_restr", 2, axis=0)
    >>> rounding_error(torch.tensor([[1.0, 0.25]]), torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    tensor([0.0625])
    """
    params = qparams_from_range(low, high, spec)
    difference = dequantize(quantize(rows, params), params).sub_(rows)
    return difference.square_().sum(1) if p == 2 else difference.abs_().pow_(p).sum(1)
