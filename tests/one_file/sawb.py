"""SAWB: weights on a symmetric grid whose range follows from their first two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlib.config.schedule.keys import POSITIVE, key
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import CodedWeight, positive
from qlib.qat.methods.range_linear_qat import linear_activation

_COEFFICIENTS = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80)}


@TRAINING_QUANTIZERS.register("SAWBQuantizer")
@dataclass(frozen=True)
class Sawb(TrainingQuantizer):
    """Weights have the range +-a of `SawbWeight`, times `range_factor`; activations a mean range.

    References: Choi et al., "Accurate and efficient 2-bit quantized neural networks", 2019, section 3.
    """

    range_factor: float = key(1.0, POSITIVE)

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", "clip_acts": "mse"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return SawbWeight(site.bits, self.range_factor, stochastic=site.stochastic)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return linear_activation(site)


class SawbWeight(CodedWeight):
    """``a = c1 sqrt(E[w^2]) + c2 E|w|``, with c1 and c2 of the bits, those of 4 for more; never beyond ``max |w|``."""

    def __init__(self, bits: int, factor: float, *, stochastic: bool) -> None:
        super().__init__(bits, stochastic=stochastic)
        self.coefficients, self.factor = _COEFFICIENTS[min(bits, 4)], factor

    def scale_of(self, weight: Tensor) -> Tensor:
        first, second = self.coefficients
        top = first * weight.square().mean().sqrt() + second * weight.abs().mean()
        return positive((top * self.factor).clamp(max=weight.abs().max())) / self.spec.qmax
