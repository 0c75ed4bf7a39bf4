"""The plan: for each layer, what is quantized, to which grid, over which range. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlib.quant.affine import QParams, qparams_from_range
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

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec.of_mode(self.mode, self.bits)

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
    """The grid of a layer's weight; its range is that of the weight itself, per tensor or per output channel."""

    bits: int
    mode: str
    per_channel: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What happens in one layer.

    `inputs[i]` is the grid to which input i is quantized first, or None where it arrives quantized or stays float;
    `weight` and `output` are None where they stay float. `float_bits` runs a float layer in 16 or 64 bits.
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

    Laws: saved, loaded and saved again gives the same bytes; a model and its plan determine every integer.
    """

    layers: Mapping[str, LayerPlan]
    dynamic: bool = False
