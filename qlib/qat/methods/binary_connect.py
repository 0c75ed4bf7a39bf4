"""BinaryConnect: weights that are one of two values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import SignWeight, mean_magnitude
from qlib.qat.methods.range_linear_qat import linear_activation, linear_weight
from qlib.qat.straight_through import held

__all__ = ["BinaryConnect", "BinaryWeight", "binary_weight"]


@TRAINING_QUANTIZERS.register("BinaryConnectQuantizer")
@dataclass(frozen=True)
class BinaryConnect(TrainingQuantizer):
    """Weights are -1 or +1 times a constant of their layer: the nearest one, or in training, if `stochastic`, either.

    Layers with more than one bit have the range of their values. Activations, if they have bits, are linear.

    References: Courbariaux et al., "BinaryConnect: training deep neural networks with binary weights during
    propagations", 2015, sections 2.2 to 2.4.
    """

    stochastic: bool = False
    min_bits: ClassVar[int] = 1

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return binary_weight(site, stochastic=self.stochastic)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return linear_activation(site)


def binary_weight(site: WeightSite, *, stochastic: bool = False) -> WeightQuantizer:
    """The quantizer of a weight of one bit; of more, that of its range."""
    if site.bits > 1:
        return linear_weight(site)
    return BinaryWeight(mean_magnitude(site.weight.detach()), stochastic=stochastic or site.stochastic)


class BinaryWeight(SignWeight):
    """``sign(v) * u`` for ``v = w / u``; stochastic: ``+u`` with probability ``clip((v + 1) / 2, 0, 1)``.

    In the paper the unit u is 1, which a batch-norm after the layer makes equivalent to any other. A trained model
    cannot start from weights 20 times its own where nothing takes the scale away, as after its classifier: u is
    ``mean |w|`` when training starts, the best scale of signs, and stays. The mean of the stochastic weight is then w,
    up to +-u.

    The paper clips w to [-1, 1] after each step, so that it cannot grow without effect. Here the gradient does not
    push it further out; it may push it back. (A bound of u would hold half of the weights from the start, and trains
    slower.)

    >>> quantizer = BinaryWeight(torch.tensor(0.5), stochastic=False)
    >>> w = torch.tensor([[-1.7, -0.1, 0.0, 1.8]], requires_grad=True)
    >>> rounded, _ = quantizer(w)
    >>> rounded.sum().backward()  # a step would make each w smaller
    >>> rounded.tolist(), w.grad.tolist()
    ([[-0.5, -0.5, 0.5, 0.5]], [[0.0, 1.0, 1.0, 1.0]])
    """

    unit: Tensor

    def __init__(self, unit: Tensor, *, stochastic: bool) -> None:
        super().__init__(stochastic=stochastic)
        self.register_buffer("unit", unit)

    def value(self, weight: Tensor) -> Tensor:
        return held(weight, torch.ones_like(self.unit))

    def scale_of(self, weight: Tensor) -> Tensor:
        return self.unit.clone()
