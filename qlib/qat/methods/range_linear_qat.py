"""Linear quantization-aware training: weights on the grid of their range, activations on that of a moving average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlib.config.layers.keys import whole
from qlib.config.schedule.keys import SHARE, key
from qlib.lower.fake import fake_quantize
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import along_outputs, dithered
from qlib.qat.straight_through import identity
from qlib.quant.affine import QParams, grid_of_range, range_of_grid, range_of_weight
from qlib.quant.spec import QuantSpec

__all__ = ["EmaActivation", "RangeLinearQat", "RangeWeight", "linear_activation", "linear_weight"]


@TRAINING_QUANTIZERS.register("QuantAwareTrainRangeLinearQuantizer")
@dataclass(frozen=True)
class RangeLinearQat(TrainingQuantizer):
    """Weights, with their batch-norm folded in, have the range of their values in each step; activations a mean range.

    The model's input has `num_bits_inputs` bits, or those of other activations. Where `quantize_inputs` is false it
    has no grid, and `activation` is not asked for one.

    References: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018, sections 3.1 and 3.2; Krishnamoorthi, "Quantizing deep convolutional networks for efficient
    inference: a whitepaper", 2018, section 3.2.2.
    """

    ema_decay: float = key(0.999, SHARE)
    per_channel_wts: bool = False
    quantize_inputs: bool = True
    num_bits_inputs: int | None = key(None, whole(2, 16, null=None))
    mode_activations: str = "sym"
    mode_weights: str = "sym"

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": self.mode_activations, "mode_weights": self.mode_weights}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return RangeWeight(site.start.spec, stochastic=site.stochastic, folds=True)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        assert self.quantize_inputs or not site.input
        bits = self.num_bits_inputs if site.input and self.num_bits_inputs is not None else site.bits
        return EmaActivation(replace(site, bits=bits), self.ema_decay)


def linear_weight(site: WeightSite) -> WeightQuantizer:
    """For methods of one or two bits, where a layer has more: the range of the weight in each step."""
    return RangeWeight(site.start.spec, stochastic=site.stochastic, folds=False)


def linear_activation(site: ActivationSite) -> ActivationQuantizer:
    """For methods that tell nothing about an edge: the mean range of its values."""
    return EmaActivation(site)


class RangeWeight(WeightQuantizer):
    """``clamp(round(w / s), qmin - z, qmax - z) * s``, where s and z are those of the range of w; straight through.

    >>> quantizer = RangeWeight(QuantSpec.of_mode("asym_u", 2), stochastic=False, folds=True)
    >>> rounded, scale = quantizer(torch.tensor([[-1.0, 0.9, 2.0]]))
    >>> rounded.tolist(), scale.item()
    ([[-1.0, 1.0, 2.0]], 1.0)
    """

    def __init__(self, spec: QuantSpec, *, stochastic: bool, folds: bool) -> None:
        super().__init__()
        self.spec, self.stochastic, self.folds = spec, stochastic, folds

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = range_of_weight(weight, self.spec.axis)
        return grid_of_range(low.double(), high.double(), self.spec)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        detached = weight.detach()
        scale, zero_point = self._grid(detached)
        wide, zero = along_outputs(scale, weight), along_outputs(zero_point, weight)
        scaled = detached / wide
        if self.stochastic and self.training:
            scaled = dithered(scaled)
        codes = scaled.round().clamp(self.spec.qmin - zero, self.spec.qmax - zero)
        return identity(weight, codes * wide), scale

    def grid(self, weight: Tensor) -> QParams:
        return QParams(*self._grid(weight.detach()), self.spec)


class EmaActivation(ActivationQuantizer):
    """On the grid of the mean range of the batches seen in training, the last ones weighing most.

    The mean of t batches is ``sum d^(t-i) r_i / sum d^(t-i)``: an exponential moving average with decay d, divided by
    ``1 - d^t`` because it starts at 0. The range that calibration found counts as the first batch.

    References: Jacob et al. 2018, section 3.1; Kingma and Ba, "Adam", 2015, section 3, for the correction.

    >>> start = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), QuantSpec.of_mode("asym_u", 2))
    >>> quantizer = EmaActivation(ActivationSite(2, start, relu=True), decay=0.5)
    >>> _ = quantizer(torch.tensor([0.0, 6.0]))  # (0.5 * 3 + 6) / 1.5 = 5, in 3 steps
    >>> round(quantizer.scale.item(), 4)
    1.6667
    """

    scale: Tensor
    range: Tensor
    weight: Tensor
    zero_point: Tensor

    def __init__(self, site: ActivationSite, decay: float = 0.999) -> None:
        super().__init__()
        self.spec, self.relu, self.decay = replace(site.start.spec, bits=site.bits), site.relu, decay
        self.register_buffer("range", torch.stack(range_of_grid(site.start)))
        self.register_buffer("weight", torch.ones((), dtype=torch.float64))
        scale, zero_point = grid_of_range(self.range[0], self.range[1], self.spec)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        seen = torch.stack(x.aminmax()).double()
        if self.relu:
            seen = seen.clamp(min=0)
        self.weight.mul_(self.decay).add_(1)
        self.range.add_((seen - self.range) / self.weight)
        scale, zero_point = grid_of_range(self.range[0], self.range[1], self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._observe(x.detach())
        low, high = self.spec.qmin - self.zero_point, self.spec.qmax - self.zero_point
        return fake_quantize(x, self.scale.clone(), low.clamp(min=0) if self.relu else low, high)

    @property
    def params(self) -> QParams:
        return QParams(self.scale.clone(), self.zero_point.clone(), self.spec)
