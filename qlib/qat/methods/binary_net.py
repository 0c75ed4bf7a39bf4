"""BinaryNet: weights and activations that are one of two values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.methods.binary_connect import binary_weight
from qlib.qat.methods.dorefa import fixed_activation
from qlib.qat.methods.range_linear_qat import linear_activation

__all__ = ["BinaryNet", "binary_activation"]


@TRAINING_QUANTIZERS.register("BinaryNetQuantizer")
@dataclass(frozen=True)
class BinaryNet(TrainingQuantizer):
    """Weights as in `BinaryConnect`; outputs of ReLUs, where they have one bit, as in `binary_activation`.

    References: Hubara et al., "Binarized neural networks", 2016, sections 2.1 and 2.3.
    """

    min_bits: ClassVar[int] = 1

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", "clip_acts": "mse"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return binary_weight(site)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return binary_activation(site)


def binary_activation(site: ActivationSite) -> ActivationQuantizer:
    """Of one bit at the place of a ReLU: 0 or a constant c, whichever is nearer; others are linear.

    The paper has ``sign(x)`` there, -1 or +1, with the gradient of x where ``|x| <= 1``. Integer kernels round x to
    ``clamp(round(x / s))``, which makes a 0 of what is near 0, so that a sign has no exact form. With
    ``x = c (u + 1) / 2`` the two are one: ``0 or c`` is ``c (sign(u) + 1) / 2``, and the gradient passes for
    ``0 <= x < c``. The layer before takes the scale and the shift into its batch-norm, the one after takes
    ``sum_w c / 2`` into its own. What differs: the zeros with which a convolution pads stand for -1, not for
    0; x = c / 2, where the sign of 0 is +1, gives 0; and c, which calibration chooses, is 2 in the paper.

    >>> import torch
    >>> from qlib.quant.affine import qparams_from_range
    >>> from qlib.quant.spec import QuantSpec
    >>> start = qparams_from_range(0.0, 2.0, QuantSpec.of_mode("asym_u", 1))
    >>> binary_activation(ActivationSite(1, start, relu=True))(torch.tensor([-4.0, 0.9, 1.1, 5.0])).tolist()
    [0.0, 0.0, 2.0, 2.0]
    """
    return fixed_activation(site) if site.bits == 1 else linear_activation(site)
