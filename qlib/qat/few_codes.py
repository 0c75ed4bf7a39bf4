"""What several methods share: weights of a few codes, and activations clipped at 0 and at a top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlib.lower.chunks import chunks, dense, laid_out_as
from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.qat.straight_through import identity
from qlib.quant.affine import QParams
from qlib.quant.spec import QuantSpec

__all__ = [
    "ClippedActivation",
    "CodedWeight",
    "SignWeight",
    "along_outputs",
    "clip_and_round",
    "dithered",
    "mean_magnitude",
    "positive",
]

_MIN_SCALE = 1e-8


def positive(scale: Tensor) -> Tensor:
    """`scale`, at least 1e-8, with its gradient: one that an optimizer makes negative can come back.

    >>> positive(torch.tensor([-0.5, 0.5]))
    tensor([1.0000e-08, 5.0000e-01])
    """
    return identity(scale, scale.detach().clamp(min=_MIN_SCALE))


def along_outputs(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale ``[]`` or ``[out]``, shaped to multiply a weight ``[out, ...]``."""
    return scale.view(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale


def mean_magnitude(weight: Tensor, *, per_channel: bool = False) -> Tensor:
    """``mean |w|``, of all or of each output channel.

    >>> weight = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    >>> mean_magnitude(weight), mean_magnitude(weight, per_channel=True)
    (tensor(1.2500), tensor([2.0000, 0.5000]))
    """
    return positive(weight.abs().flatten(1).mean(1) if per_channel else weight.abs().mean())


def dithered(scaled: Tensor, gap: int = 1) -> Tensor:
    """With noise that is uniform over the `gap` between two quantized values: to round it is stochastic rounding.

    The nearest quantized value is then one of the two around a number, the nearer the likelier, so that its mean is the
    number.

    References: Gupta et al., "Deep learning with limited numerical precision", 2015, section 3.

    >>> _ = torch.manual_seed(0)
    >>> round(dithered(torch.full([10000], 0.3)).round().mean().item(), 1)
    0.3
    """
    return scaled + (torch.rand_like(scaled) - 0.5) * gap


class CodedWeight(WeightQuantizer):
    """``codes(value(w) / s) * s`` with ``s = scale_of(w)``, straight through: the gradient is that of `value`.

    Stochastic: in training, values are `dithered` over the `gap` between two codes.
    """

    gap = 1

    def __init__(self, bits: int, *, stochastic: bool, per_channel: bool = False) -> None:
        super().__init__()
        self.spec = QuantSpec.of_mode("sym_restr", bits, 0 if per_channel else None)
        self.stochastic = stochastic

    def value(self, weight: Tensor) -> Tensor:
        """What is rounded, differentiable."""
        return weight

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale, ``[]`` or ``[out]``, of a detached weight."""
        raise NotImplementedError

    def codes(self, scaled: Tensor, weight: Tensor) -> Tensor:
        """The codes of a detached weight, given in units of the scale."""
        return scaled.round().clamp_(self.spec.qmin, self.spec.qmax)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value, detached = self.value(weight), weight.detach()
        scale = self.scale_of(detached)
        wide = along_outputs(scale, weight)
        scaled = value.detach() / wide
        if self.stochastic and self.training:
            scaled = dithered(scaled, self.gap)
        return identity(value, self.codes(scaled, detached) * wide), scale

    def grid(self, weight: Tensor) -> QParams:
        scale = self.scale_of(weight.detach())
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), self.spec)


class SignWeight(CodedWeight):
    """The codes -1 and +1 of a grid of 2 bits; the sign of 0 is +1.

    Stochastic: +1 with probability ``clip((v + 1) / 2, 0, 1)``, where v is the value in units of the scale.
    """

    gap = 2

    def __init__(self, *, stochastic: bool, per_channel: bool = False) -> None:
        super().__init__(2, stochastic=stochastic, per_channel=per_channel)

    def codes(self, scaled: Tensor, weight: Tensor) -> Tensor:
        return (scaled >= 0).to(scaled.dtype).mul_(2).sub_(1)


class _ClipAndRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, qmax: int) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, top)
        scale, y = top / qmax, torch.empty_like(x)
        for part, out in chunks(x, y):
            torch.div(part, scale, out=out).round_().clamp_(0, qmax).mul_(scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, top = ctx.saved_tensors
        grad, of_x = laid_out_as(x, grads[0]), torch.empty_like(x)
        of_top = torch.zeros((), dtype=top.dtype, device=top.device)
        for part, up, out in chunks(x, grad, of_x):
            below = part.clone().lt_(top)  # numbers, not truth values, which would be converted again and again
            torch.mul(up, below, out=out)
            if ctx.needs_input_grad[1]:
                of_top += up.sum() - out.sum()
            out.mul_(below.copy_(part).ge_(0))
        return of_x, of_top if ctx.needs_input_grad[1] else None, None


def clip_and_round(x: Tensor, top: Tensor, qmax: int) -> Tensor:
    """``round(clip(x, 0, top) / s) * s`` with ``s = top / qmax``, differentiable, in few passes over memory.

    The gradient of x is 1 for ``0 <= x < top``, 0 elsewhere; that of the top is 1 where ``x >= top``.

    References: Choi et al., "PACT: parameterized clipping activation for quantized neural networks", 2018, section 3.

    >>> x, top = torch.tensor([-1.0, 0.9, 2.5], requires_grad=True), torch.tensor(1.5, requires_grad=True)
    >>> y = clip_and_round(x, top, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), top.grad.item()
    ([0.0, 1.0, 1.5], [0.0, 1.0, 0.0], 1.0)
    """
    y: Tensor = _ClipAndRound.apply(x, top, qmax)
    return y


class ClippedActivation(ActivationQuantizer):
    """The output of a ReLU, which it computes, from 0 to a `top` in ``2^bits - 1`` steps; the top may be learned."""

    def __init__(self, bits: int, top: Tensor, *, learned: bool = False) -> None:
        super().__init__()
        self.spec = QuantSpec.of_mode("asym_u", bits)
        self.top = nn.Parameter(top.detach().clone().float(), requires_grad=learned)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return positive(self.top.detach()) / self.spec.qmax

    def forward(self, x: Tensor) -> Tensor:
        return clip_and_round(x, positive(self.top), self.spec.qmax)

    @property
    def params(self) -> QParams:
        return QParams(self.scale, torch.zeros_like(self.scale, dtype=torch.int32), self.spec)
