"""XNOR-Net: binary weights with the scale of each output channel, and binary activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import SignWeight, along_outputs, mean_magnitude
from qlib.qat.methods.binary_net import binary_activation
from qlib.qat.methods.range_linear_qat import linear_weight
from qlib.qat.straight_through import identity

__all__ = ["Xnor", "XnorWeight"]


@TRAINING_QUANTIZERS.register("XNORQuantizer")
@dataclass(frozen=True)
class Xnor(TrainingQuantizer):
    """Weights of one bit are their sign times their mean magnitude; of more, linear. Activations as in `BinaryNet`.

    The paper's second scale, the mean magnitude of each place of an activation, is left out: it has no integer form,
    and the paper reports that it matters little beside that of the weights.

    References: Rastegari et al., "XNOR-Net: ImageNet classification using binary convolutional neural networks", 2016,
    section 3.
    """

    min_bits: ClassVar[int] = 1

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", "clip_acts": "mse"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return XnorWeight(stochastic=site.stochastic) if site.bits == 1 else linear_weight(site)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return binary_activation(site)


class XnorWeight(SignWeight):
    """``a sign(w)``, ``a = mean |w|`` of each output channel; the gradient is multiplied by ``1 / n + a [|w| <= 1]``.

    Both a and the sign depend on w: ``1 / n`` stands for the part of the former, with n weights in a channel. The
    gradient is small, as a is: the paper trains with Adam, which takes that out; plain descent needs a larger rate.

    References: Rastegari et al. 2016, section 3.1.

    >>> import torch
    >>> w = torch.tensor([[0.5, -1.5]], requires_grad=True)
    >>> rounded, _ = XnorWeight(stochastic=False)(w)
    >>> rounded.sum().backward()
    >>> rounded.tolist(), w.grad.tolist()
    ([[1.0, -1.0]], [[1.5, 0.5]])
    """

    def __init__(self, *, stochastic: bool) -> None:
        super().__init__(stochastic=stochastic, per_channel=True)

    def value(self, weight: Tensor) -> Tensor:
        detached = weight.detach()
        near = (detached.abs() <= 1) * along_outputs(self.scale_of(detached), weight)
        return identity(weight * (near + 1 / weight[0].numel()), detached)

    def scale_of(self, weight: Tensor) -> Tensor:
        return mean_magnitude(weight, per_channel=True)
