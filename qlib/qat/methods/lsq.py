"""LSQ: the scale of each grid is a parameter that is learned with the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlib.lower.fake import fake_quantize
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import along_outputs, positive
from qlib.qat.straight_through import identity
from qlib.quant.affine import QParams

__all__ = ["Lsq", "LsqActivation", "LsqWeight", "scaled_gradient"]


@TRAINING_QUANTIZERS.register("LSQQuantizer")
@dataclass(frozen=True)
class Lsq(TrainingQuantizer):
    """Scales of weights, per tensor or per output channel, and of activations are learned.

    They start from the ranges of least squared error instead of the paper's ``2 mean|v| / sqrt(q)``, which assumes that
    training is long.
    """

    per_channel_wts: bool = True

    @property
    def planning(self) -> Mapping[str, object]:
        clips = {"clip_acts": "mse", "clip_wts": "mse"}
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", **clips}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return LsqWeight(site.start, stochastic=site.stochastic)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return LsqActivation(site.start, site.relu)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> scaled_gradient(x, 0.5).backward()
    >>> x.grad
    tensor(0.5000)
    """
    return identity(x * factor, x.detach())


class LsqWeight(WeightQuantizer):
    """``clamp(round(w / s), -q, q) * s`` with a learned s, per tensor or per output channel.

    The gradient of s, ``round(w / s) - w / s`` or the bound, is multiplied by ``1 / sqrt(N q)`` for the N weights that
    share s, so that scales and weights learn at the same pace.

    References: Esser et al., "Learned step size quantization", 2020, sections 2.1 and 2.2.
    """

    def __init__(self, start: QParams, *, stochastic: bool = False) -> None:
        super().__init__()
        assert start.spec.symmetric
        assert start.spec.restricted
        self.spec, self.stochastic = start.spec, stochastic
        self.scale = nn.Parameter(start.scale.clone())

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        factor = 1 / math.sqrt(weight.numel() / self.scale.numel() * self.spec.qmax)
        scale = scaled_gradient(positive(self.scale), factor)
        wide = along_outputs(scale, weight)
        if self.stochastic and self.training:
            weight = weight + (torch.rand_like(weight) - 0.5) * wide.detach()
        return fake_quantize(weight, wide, self.spec.qmin, self.spec.qmax), scale.detach()

    def grid(self, weight: Tensor) -> QParams:
        scale = positive(self.scale.detach())
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), self.spec)


class LsqActivation(ActivationQuantizer):
    """``clamp(round(x / s), low, high) * s`` with a learned s; the zero point is that of the range it starts with.

    References: Esser et al., "Learned step size quantization", 2020, sections 2.1 and 2.2.
    """

    def __init__(self, start: QParams, relu: bool) -> None:
        super().__init__()
        self.spec, self.zero_point = start.spec, start.zero_point
        self.low, self.high = max(int(start.low), 0) if relu else int(start.low), int(start.high)
        self.scale = nn.Parameter(start.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / math.sqrt(x[0].numel() * max(self.high, 1))
        scale = scaled_gradient(positive(self.scale), factor)
        return fake_quantize(x, scale, self.low, self.high)

    @property
    def params(self) -> QParams:
        return QParams(positive(self.scale.detach()), self.zero_point, self.spec)
