"""TWN: ternary weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import CodedWeight, mean_magnitude, positive
from qlib.qat.methods.range_linear_qat import linear_activation, linear_weight

__all__ = ["TernaryWeight", "Twn"]


@TRAINING_QUANTIZERS.register("TWNQuantizer")
@dataclass(frozen=True)
class Twn(TrainingQuantizer):
    """Weights of 2 bits are -a, 0 or a; of more, linear, as are activations, if they have bits.

    References: Li et al., "Ternary weight networks", 2016, section 2.
    """

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return TernaryWeight(2, stochastic=site.stochastic) if site.bits == 2 else linear_weight(site)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return linear_activation(site)


class TernaryWeight(CodedWeight):
    """``a sign(w)`` where ``|w| > d``, else 0, with ``d = 0.7 mean |w|`` and a the mean of ``|w|`` beyond d.

    That is nearly the threshold of least squared error, for which the scale is the best one. Straight through.

    References: Li et al. 2016, section 2.2.

    >>> import torch
    >>> rounded, _ = TernaryWeight(2, stochastic=False)(torch.tensor([[-0.9, 0.1, 0.3, 0.7]]))  # d = 0.35
    >>> rounded
    tensor([[-0.8000,  0.0000,  0.0000,  0.8000]])
    """

    def scale_of(self, weight: Tensor) -> Tensor:
        beyond = weight.abs() > self._threshold(weight)
        return positive((weight.abs() * beyond).sum() / beyond.sum().clamp(min=1))

    def codes(self, scaled: Tensor, weight: Tensor) -> Tensor:
        threshold = self._threshold(weight) / self.scale_of(weight)
        return scaled.sign() * (scaled.abs() > threshold)

    @staticmethod
    def _threshold(weight: Tensor) -> Tensor:
        return 0.7 * mean_magnitude(weight)
