"""DoReFa: weights squashed by tanh, activations clipped at a constant, and gradients of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlib.config.layers.keys import whole
from qlib.config.schedule.keys import key
from qlib.lower.chunks import dense, image_chunks
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import ClippedActivation, CodedWeight, SignWeight, mean_magnitude, positive
from qlib.qat.methods.range_linear_qat import linear_activation

__all__ = ["Dorefa", "DorefaGradient", "DorefaWeight", "MeanSignWeight", "dorefa_weight", "fixed_activation"]


@TRAINING_QUANTIZERS.register("DorefaQuantizer")
@dataclass(frozen=True)
class Dorefa(TrainingQuantizer):
    """Weights, outputs of ReLUs, and gradients of outputs if `bits_gradients` is given, have few bits.

    The paper trains from the start, with weights and activations in [-1, 1] and [0, 1]. To begin with a trained model,
    both are measured in a unit of their own, a constant of each layer: the largest magnitude of its weights, and the
    range that calibration found for its output. With a unit of 1 the formulas are the paper's; a batch-norm after a
    layer makes any other one equivalent.

    References: Zhou et al., "DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth
    gradients", 2016, section 2.
    """

    bits_gradients: int | None = key(None, whole(2, 16, null=None))
    min_bits: ClassVar[int] = 1
    only_relus: ClassVar[bool] = True

    @property
    def planning(self) -> Mapping[str, object]:
        return {"mode_activations": "asym_u", "mode_weights": "sym_restr", "clip_acts": "mse"}

    def weight(self, site: WeightSite) -> WeightQuantizer:
        return dorefa_weight(site)

    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        return fixed_activation(site)

    def gradient(self) -> nn.Module | None:
        return None if self.bits_gradients is None else DorefaGradient(self.bits_gradients)


def dorefa_weight(site: WeightSite) -> WeightQuantizer:
    """The quantizer of a weight: of one bit, or of more."""
    if site.bits == 1:
        return MeanSignWeight(stochastic=site.stochastic)
    return DorefaWeight(site.bits, site.weight.detach().abs().max(), stochastic=site.stochastic)


def fixed_activation(site: ActivationSite) -> ActivationQuantizer:
    """The output of a ReLU clipped to the range that it starts with; others have the mean range of their values."""
    return ClippedActivation(site.bits, site.start.scale * site.start.high) if site.relu else linear_activation(site)


class DorefaWeight(CodedWeight):
    """``2 quantize_n(t / 2 + 1/2) - 1`` in a constant unit u, where ``t = tanh(w) / max |tanh(w)|``.

    With ``quantize_n(x) = round(N x) / N``, ``N = 2^n - 1``, that is an odd multiple of ``u / N``, from -u to u: 2^n
    values without 0, on a symmetric grid of n + 1 bits. From 8 bits on it would have 9: ``round(N t) / N`` with
    ``N = 2^(n-1) - 1`` takes its place.

    References: Zhou et al. 2016, section 2.3.

    >>> quantizer = DorefaWeight(2, torch.tensor(1.0), stochastic=False)
    >>> quantizer(torch.tensor([[-9.0, -0.1, 0.1, 2.0]]))[0] * 3  # in units of 1 / N
    tensor([[-3., -1.,  1.,  3.]])
    """

    unit: Tensor

    def __init__(self, bits: int, unit: Tensor, *, stochastic: bool) -> None:
        self.odd = bits < 8
        super().__init__(bits + self.odd, stochastic=stochastic)
        self.qmax = 2**bits - 1 if self.odd else self.spec.qmax
        self.gap = 1 + self.odd
        self.register_buffer("unit", positive(unit))

    def value(self, weight: Tensor) -> Tensor:
        squashed = torch.tanh(weight)
        return squashed * (self.unit / positive(squashed.abs().max()))

    def scale_of(self, weight: Tensor) -> Tensor:
        return self.unit / self.qmax

    def codes(self, scaled: Tensor, weight: Tensor) -> Tensor:
        qmax = self.qmax
        codes = 2 * torch.round((scaled + qmax) / 2) - qmax if self.odd else scaled.round()
        return codes.clamp_(-qmax, qmax)


class MeanSignWeight(SignWeight):
    """``sign(w) * mean |w|``, straight through.

    References: Zhou et al. 2016, section 2.3.

    >>> MeanSignWeight(stochastic=False)(torch.tensor([[-3.0, 0.0, 1.5, 0.5]]))[0]
    tensor([[-1.2500,  1.2500,  1.2500,  1.2500]])
    """

    def scale_of(self, weight: Tensor) -> Tensor:
        return mean_magnitude(weight)


class DorefaGradient(nn.Module):
    """Passes its input on; the gradient on its way back is rounded to `bits`, image by image, with noise.

    ``2 m (quantize_k(g / 2m + 1/2 + noise) - 1/2)``, where m is the largest magnitude of an image's gradient and the
    noise is uniform over ``+-1/2 / (2^k - 1)``: that is rounding up or down at random, with the right mean.

    References: Zhou et al. 2016, section 2.5.

    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> (DorefaGradient(2)(x) * torch.tensor([3.0, -3.0, 0.0])).sum().backward()
    >>> x.grad[0, :2], x.grad[0, 2].abs()  # of the values -3, -1, 1 and 3
    (tensor([ 3., -3.]), tensor(1.))
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RoundedGradient.apply(x, 2**self.bits - 1)
        return y


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qmax: int) -> Tensor:
        ctx.qmax = qmax
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qmax, grad = ctx.qmax, dense(grads[0])
        rounded, noise = torch.empty_like(grad), _uniform_noise(grad)
        for part, shift, out in image_chunks(grad, noise, rounded):
            largest = part.abs().amax(1, keepdim=True)
            scale = (2 / qmax) * largest.clamp(min=torch.finfo(grad.dtype).tiny)
            torch.div(part, scale, out=out).add_(shift, alpha=2**-16).add_(qmax / 2).round_().clamp_(0, qmax)
            out.sub_(qmax / 2).mul_(scale)
        return rounded, None


def _uniform_noise(like: Tensor) -> Tensor:
    """int16 of any value, each as likely, laid out as `like`: four of them cost what one random number costs."""
    drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return drawn.view(torch.int16)[: like.numel()].as_strided(like.shape, like.stride())
