"""The plan: for each layer, what is quantized, to which grid, over which range. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.quant.affine import QParams, qparams_from_range, range_of_weight
from qlib.quant.spec import QuantSpec

__all__ = ["LayerPlan", "Plan", "TensorPlan", "WeightPlan"]


@dataclass(frozen=True)
class TensorPlan:
    """The grid of one activation tensor: bits, mode, and the range it covers; `clip` tells how the range was chosen.

    Law: scale and zero point follow from these fields alone, so that an edit of any of them stays consistent.
    In a dynamic plan the range is None: it is taken from each image.
    """

    bits: int
    mode: str
    clip: str = "none"
    min: float | None = None
    max: float | None = None
    n_stds: float | None = None
    pow2: bool = False

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec.of_mode(self.mode, self.bits, pow2=self.pow2)

    def qparams(self) -> QParams:
        """Scale and zero point of the range; the plan must not be dynamic.

        >>> TensorPlan(8, "asym_u", min=0.0, max=25.5).qparams().zero_point.item()
        0
        """
        assert self.min is not None, "a dynamic tensor has no fixed range"
        assert self.max is not None, "a dynamic tensor has no fixed range"
        return qparams_from_range(self.min, self.max, self.spec)


@dataclass(frozen=True)
class WeightPlan:
    """The grid of a layer's weight, per tensor or per output channel; `clip` tells how its range was chosen.

    `min` and `max` hold one number, or one for each channel. Where they are None, the range is that of the weight.
    """

    bits: int
    mode: str
    per_channel: bool = False
    clip: str = "none"
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    pow2: bool = False

    def __post_init__(self) -> None:
        assert (self.min is None) == (self.max is None)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec.of_mode(self.mode, self.bits, 0 if self.per_channel else None, self.pow2)

    def qparams(self, weight: Tensor) -> QParams:
        """Scale and zero point for a weight ``[out, ...]``, on its device.

        >>> WeightPlan(8, "sym_restr").qparams(torch.tensor([[1.27, -0.5]])).scale.item() == torch.tensor(0.01).item()
        True
        >>> WeightPlan(4, "sym_restr", min=(-0.7,), max=(0.7,)).qparams(torch.tensor([[1.27]])).scale.item()
        0.10000000149011612
        """
        if self.min is None or self.max is None:
            return qparams_from_range(*range_of_weight(weight, self.spec.axis), self.spec)
        shape = (-1,) if self.per_channel else ()
        low, high = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (self.min, self.max))
        return qparams_from_range(low.to(weight.device), high.to(weight.device), self.spec)


@dataclass(frozen=True)
class LayerPlan:
    """What happens in one layer.

    `inputs[i]` is the grid to which input i is quantized first, from float or from the grid it arrives on, or None
    where it is taken as it arrives; `weight` and `output` are None where they stay float. `float_bits` runs a float
    layer in 16 or 64 bits.
    `note` says why a layer, or a part of it, stays in float.
    """

    kind: str
    inputs: tuple[TensorPlan | None, ...] = ()
    weight: WeightPlan | None = None
    output: TensorPlan | None = None
    bits_bias: int = 32
    bits_accum: int = 32
    scale_approx_bits: int | None = None
    float_bits: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Layer name -> plan, in execution order.

    Laws: saved, loaded and saved again gives the same bytes; a model and its plan determine every integer, together
    with the file `weights` beside it where corrections have changed weights or biases of the folded model.
    """

    layers: Mapping[str, LayerPlan]
    dynamic: bool = False
    weights: str | None = None
