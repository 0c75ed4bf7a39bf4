"""LSQ+: the scale and the offset of each activation's grid are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlib.lower.fake import fake_quantize
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import positive
from qlib.qat.methods.lsq import LsqActivation, LsqWeight, scaled_gradient
from qlib.qat.straight_through import identity
from qlib.quant.affine import QParams

__all__ = ["LsqPlus", "LsqPlusActivation"]


@TRAINING_QUANTIZERS.register("LSQPlusQuantizer")
@dataclass(frozen=True)
class LsqPlus(TrainingQuantizer):
    """LSQ, in which activations that are no output of a ReLU learn an offset too.

    Grids start from the ranges of least squared error, which is what the paper's start approximates.

    References: Bhalgat et al., "LSQ+: improving low-bit quantization through learnable offsets and better
    initialization", 2020, section 3.
    """

    per_channel_wts: bool = True

    @property
    def planning(self) -> Mapping[str, object]:
        clips = {"clip_acts": "mse", "clip_wts": "mse"}
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", **clips}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return LsqWeight(site.start, stochastic=site.stochastic)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return LsqActivation(site.start, relu=True) if site.relu else LsqPlusActivation(site.start)


class LsqPlusActivation(ActivationQuantizer):
    """``clamp(round((x - b) / s), 0, N) * s + b`` with a learned s and b, for an unsigned grid of ``N + 1`` codes.

    What is deployed has an integer zero point, so b is rounded to a multiple of s, straight through; its gradient is 1
    where x is clipped, 0 elsewhere. It is multiplied, as that of s, by ``1 / sqrt(values of an image * N)``.

    References: Bhalgat et al. 2020, sections 3.1 and 3.2.

    >>> from qlib.quant.spec import QuantSpec
    >>> start = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), QuantSpec.of_mode("asym_u", 2))
    >>> quantizer = LsqPlusActivation(start)
    >>> y = quantizer(torch.tensor([[-2.0, 0.1, 0.4, 4.0]]))
    >>> y.tolist(), quantizer.params.zero_point.item()
    ([[-0.5, 0.0, 0.5, 1.0]], 1)
    >>> y.sum().backward()
    >>> round(quantizer.offset.grad.item() * math.sqrt(4 * 3), 4)  # two values are clipped
    2.0
    """

    def __init__(self, start: QParams) -> None:
        super().__init__()
        assert not start.spec.signed
        self.spec = start.spec
        self.scale = nn.Parameter(start.scale.clone())
        self.offset = nn.Parameter(start.scale * start.low)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / math.sqrt(x[0].numel() * self.spec.qmax)
        scale = scaled_gradient(positive(self.scale), factor)
        low = self._lowest(scale, scaled_gradient(self.offset, factor))
        return fake_quantize(x, scale, low, low + self.spec.qmax)

    def _lowest(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The lowest centered code: 0 must be one, so that padding and biases are exact."""
        scaled = offset / scale
        return identity(scaled, scaled.detach().round().clamp(-self.spec.qmax, 0))

    @property
    def params(self) -> QParams:
        scale = positive(self.scale.detach())
        return QParams(scale, (-self._lowest(scale, self.offset.detach())).to(torch.int32), self.spec)
