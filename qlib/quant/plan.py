"""The plan: for each layer, what is quantized, to which grid, over which range. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlib.quant.affine import QParams, qparams_from_range, range_of_grid, range_of_weight
from qlib.quant.spec import QuantSpec

__all__ = ["LayerPlan", "Plan", "TensorPlan", "WeightPlan"]


@dataclass(frozen=True)
class TensorPlan:
    """Quantization of one activation tensor: its format and the range it covers; `clip` tells how that was chosen.

    Law: scale and zero point follow from these fields alone, so that an edit of any of them stays consistent.
    In a dynamic plan the range is None: it is taken from each image, by `clip` with `clip_parameters`, by their keys in
    YAML.
    """

    spec: QuantSpec
    clip: str = "none"
    min: float | None = None
    max: float | None = None
    clip_parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        assert self.spec.axis is None

    def qparams(self) -> QParams:
        """Scale and zero point of the range; the plan must not be dynamic.

        >>> TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=25.5).qparams().zero_point.item()
        0
        """
        assert self.min is not None, "a dynamic tensor has no fixed range"
        assert self.max is not None, "a dynamic tensor has no fixed range"
        return qparams_from_range(self.min, self.max, self.spec)

    def on_grid(self, params: QParams, clip: str | None = None) -> TensorPlan:
        """With format and range of another grid; `clip` tells how that was found, None that it is as before.

        >>> grid = TensorPlan(QuantSpec.of_mode("asym_u", 4), min=0.0, max=7.5).qparams()
        >>> TensorPlan(QuantSpec.of_mode("asym_u", 8)).on_grid(grid).qparams().scale
        tensor(0.5000)
        """
        low, high = range_of_grid(params)
        return replace(self, spec=params.spec, clip=clip or self.clip, min=float(low), max=float(high))


@dataclass(frozen=True)
class WeightPlan:
    """Quantization of a layer's weight, per tensor or per output channel; `clip` tells how its range was chosen.

    `min` and `max` hold one number, or one for each channel. Where they are None, the range is that of the weight.
    `raised` tells how many scales are larger than that, because int32 would not hold bias or accumulator.
    """

    spec: QuantSpec
    clip: str = "none"
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    raised: int = 0

    def __post_init__(self) -> None:
        assert self.spec.axis in (None, 0)
        assert (self.min is None) == (self.max is None)

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a scale and zero point of its own."""
        return self.spec.axis is not None

    def qparams(self, weight: Tensor) -> QParams:
        """Scale and zero point for a weight ``[out, ...]``, on its device.

        >>> weight = torch.tensor([[1.27, -0.5]])
        >>> WeightPlan(QuantSpec.of_mode("sym_restr", 8)).qparams(weight).scale
        tensor(0.0100)
        >>> WeightPlan(QuantSpec.of_mode("sym_restr", 4), min=(-0.7,), max=(0.7,)).qparams(weight).scale
        tensor(0.1000)
        """
        if self.min is None or self.max is None:
            return qparams_from_range(*range_of_weight(weight, self.spec.axis), self.spec)
        shape = (-1,) if self.per_channel else ()
        low, high = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (self.min, self.max))
        return qparams_from_range(low.to(weight.device), high.to(weight.device), self.spec)

    def on_grid(self, params: QParams) -> WeightPlan:
        """With the range of another grid of this format."""
        low, high = (tuple(ends.reshape(-1).tolist()) for ends in range_of_grid(params))
        return replace(self, min=low, max=high)


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

    def with_grids(
        self, inputs: Sequence[QParams | None], output: QParams | None, clip: str | None = None
    ) -> LayerPlan:
        """With other grids of the activations that are quantized, as `TensorPlan.on_grid`; None keeps what is there."""

        def on(plan: TensorPlan | None, params: QParams | None) -> TensorPlan | None:
            return plan if plan is None or params is None else plan.on_grid(params, clip)

        on_grids = tuple(on(plan, params) for plan, params in zip(self.inputs, inputs, strict=True))
        return replace(self, inputs=on_grids, output=on(self.output, output))


@dataclass(frozen=True)
class Plan:
    """Layer name -> plan, in execution order.

    Laws: saved, loaded and saved again gives the same bytes; a model and its plan determine every integer, together
    with the file `weights` beside it where corrections have changed weights or biases of the folded model.
    """

    layers: Mapping[str, LayerPlan]
    dynamic: bool = False
    weights: str | None = None
