"""WRPN: fixed-point weights and activations of few bits, in wider layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlib.config.layers.keys import whole
from qlib.config.schedule.keys import key
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import CodedWeight, positive
from qlib.qat.methods.dorefa import MeanSignWeight, fixed_activation
from qlib.qat.straight_through import held

__all__ = ["Wrpn", "WrpnWeight"]


@TRAINING_QUANTIZERS.register("WRPNQuantizer")
@dataclass(frozen=True)
class Wrpn(TrainingQuantizer):
    """Weights are clipped to [-1, 1], outputs of ReLUs to [0, 1], each in a constant unit as in `Dorefa`.

    `widen` is the factor by which `widen.widened` multiplies the channels of the model before training. The formula
    of weights needs 2 bits; those of 1 bit are ``sign(w) * mean |w|``.

    References: Mishra et al., "WRPN: wide reduced-precision networks", 2018, sections 3 and 5.
    """

    widen: int = key(1, whole(1, 8, null=1))
    min_bits: ClassVar[int] = 1
    only_relus: ClassVar[bool] = True

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", "clip_acts": "mse"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        if site.bits == 1:
            return MeanSignWeight(stochastic=site.stochastic)
        return WrpnWeight(site.bits, site.weight.detach().abs().max(), stochastic=site.stochastic)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return fixed_activation(site)


class WrpnWeight(CodedWeight):
    """``round(N clip(w, -1, 1)) / N`` in a constant unit, where ``N = 2^(k-1) - 1``: k - 1 bits behind the point.

    What the clip cuts off can come back, as `held` says.

    References: Mishra et al. 2018, section 5.

    >>> import torch
    >>> quantizer = WrpnWeight(3, torch.tensor(1.0), stochastic=False)
    >>> quantizer(torch.tensor([[-2.0, -0.3, 0.1, 0.6]]))[0] * 3
    tensor([[-3., -1.,  0.,  2.]])
    """

    unit: Tensor

    def __init__(self, bits: int, unit: Tensor, *, stochastic: bool) -> None:
        super().__init__(bits, stochastic=stochastic)
        self.register_buffer("unit", positive(unit))

    def value(self, weight: Tensor) -> Tensor:
        return held(weight, self.unit)

    def scale_of(self, weight: Tensor) -> Tensor:
        return self.unit / self.spec.qmax
