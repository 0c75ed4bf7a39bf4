"""PACT: the top at which activations are clipped is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from qlib.config.schedule.keys import FROM_0, POSITIVE, key
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import ClippedActivation
from qlib.qat.methods.dorefa import dorefa_weight
from qlib.qat.methods.range_linear_qat import linear_activation

__all__ = ["Pact"]


@TRAINING_QUANTIZERS.register("PACTQuantizer")
@dataclass(frozen=True)
class Pact(TrainingQuantizer):
    """Outputs of ReLUs are ``0.5 (|x| - |x - a| + a)``, that is x clipped to [0, a], in steps of ``a / (2^k - 1)``.

    One a for each, learned from `act_clip_init_val`; its gradient is 1 where ``x >= a``. `act_clip_decay` is its weight
    decay, without which large ones do not shrink. Weights are those of DoReFa.

    References: Choi et al., "PACT: parameterized clipping activation for quantized neural networks", 2018, section 3.

    >>> from qlib.quant.affine import qparams_from_range
    >>> from qlib.quant.spec import QuantSpec
    >>> start = qparams_from_range(0.0, 5.0, QuantSpec.of_mode("asym_u", 2))
    >>> quantizer = Pact(act_clip_init_val=6.0).activation(ActivationSite(2, start, relu=True))
    >>> quantizer(torch.tensor([-4.0, 2.5, 9.0])).tolist()
    [0.0, 2.0, 6.0]
    """

    act_clip_init_val: float = key(8.0, POSITIVE)
    act_clip_decay: float | None = key(None, FROM_0.or_null("or null for none"))
    min_bits: ClassVar[int] = 1
    only_relus: ClassVar[bool] = True

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return dorefa_weight(site)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        if not site.relu:
            return linear_activation(site)
        return ClippedActivation(site.bits, torch.tensor(self.act_clip_init_val), learned=True)

    @property
    def weight_decay(self) -> float:
        return self.act_clip_decay or 0.0
