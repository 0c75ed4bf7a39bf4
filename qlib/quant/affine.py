"""Affine quantization: ranges to scale and zero point, real values to quantized values and back, requantization.

A *code* is a quantized value: the integer ``q = clamp(round(x / s) + z, qmin, qmax)`` of a real value x, with scale s
and zero point z. A *centered code* is ``q - z``, corrected by the zero point. The *grid* is all values ``(q - z) * s``.

Everything is float32, in the order that ONNX Runtime's kernels use, so that codes agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.quant.spec import QuantSpec

__all__ = [
    "QParams",
    "approximate_factor",
    "dequantize",
    "grid_of_range",
    "qparams_from_range",
    "quantize",
    "range_of_grid",
    "range_of_weight",
    "requant_factor",
]


@dataclass(frozen=True, eq=False)
class QParams:
    """Quantization parameters: float32 `scale` and int32 `zero_point`, each a scalar or ``[channels]``.

    Laws: ``x ~= (q - zero_point) * scale``; the scale is positive and finite; the zero point of a range is a code, so
    that 0 is on the grid, and 0 for a symmetric spec.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        assert self.scale.dtype == torch.float32
        assert self.zero_point.dtype == torch.int32
        assert self.scale.shape == self.zero_point.shape
        assert bool((torch.isfinite(self.scale) & (self.scale > 0)).all()), self.scale

    @property
    def low(self) -> Tensor:
        """The smallest centered code, ``qmin - zero_point``."""
        return self.spec.qmin - self.zero_point

    @property
    def high(self) -> Tensor:
        """The largest centered code, ``qmax - zero_point``."""
        return self.spec.qmax - self.zero_point

    def same_grid(self, other: QParams) -> bool:
        """Whether both stand for the same values code by code."""
        return (
            self.spec == other.spec
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


def qparams_from_range(low: Tensor | float, high: Tensor | float, spec: QuantSpec) -> QParams:
    """Scale and zero point that cover ``[low, high]`` (scalars, or ``[channels]`` each).

    With n bits, ``sat = max(|low|, |high|)``, ``lo = min(low, 0)``, ``hi = max(high, 0)``:

    - symmetric: ``s = sat / ((2^n - 1) / 2)``, restricted: ``s = sat / (2^(n-1) - 1)``; ``z = 0``
    - asymmetric: ``s = (hi - lo) / (2^n - 1)``, ``z = qmin - round(lo / s)``
    - power of two: the smallest ``2^k`` from there upwards, so that the whole range stays covered

    An all-zero range, or one too small for float32, gives ``s = 1``. Raises ValueError for a range that is not finite
    or is reversed.

    >>> p = qparams_from_range(-2.0, 10.0, QuantSpec.of_mode("asym_u", 8))
    >>> round(1 / p.scale.item(), 4), p.zero_point.item()
    (21.25, 42)
    >>> round(1 / qparams_from_range(-4.0, 1.0, QuantSpec.of_mode("sym", 8)).scale.item(), 4)
    31.875
    >>> qparams_from_range(-4.0, 1.0, QuantSpec.of_mode("sym", 8, pow2=True)).scale.item()
    0.0625
    """
    lo = torch.as_tensor(low, dtype=torch.float64)
    hi = torch.as_tensor(high, dtype=torch.float64)
    if not bool(torch.isfinite(lo).all() and torch.isfinite(hi).all()):
        raise ValueError("range is not finite")
    if bool((lo > hi).any()):
        raise ValueError("minimum is above maximum")
    return QParams(*grid_of_range(lo, hi, spec), spec)


def grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point as `qparams_from_range` gives them, of a float64 range that is not checked.

    It reads no value, so that it does not wait for the device.
    """
    intervals = spec.qmax - spec.qmin
    if spec.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (intervals / 2)
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / intervals
    scale = scale.float()
    if spec.pow2:
        scale = _next_power_of_two(scale)
    tiny = torch.finfo(torch.float32).tiny  # below it, dividing by the scale overflows
    scale = torch.where(scale >= tiny, scale, torch.ones_like(scale))
    if spec.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (spec.qmin - torch.round(low / scale.double())).clamp(spec.qmin, spec.qmax)
    return scale, zero_point.to(torch.int32)


def _next_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below `scale`, exactly: 0.25 stays, 0.3 becomes 0.5."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))


def _channelwise(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """`values` of a channel axis, shaped to broadcast against `like`."""
    if axis is None or values.ndim == 0:
        return values
    return values.view([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def quantize(x: Tensor, params: QParams) -> Tensor:
    """Quantized values of `x`, integers held in float32: ``clamp(round_half_even(x / s) + z, qmin, qmax)``.

    A true division: multiplying by the reciprocal differs on ties.

    >>> p = qparams_from_range(-2.0, 10.0, QuantSpec.of_mode("asym_u", 8))
    >>> quantize(torch.tensor([-3.0, 0.0, 10.0]), p)
    tensor([  0.,  42., 254.])
    """
    scale = _channelwise(params.scale, x, params.spec.axis)
    zero_point = _channelwise(params.zero_point, x, params.spec.axis)
    return torch.round(x / scale).add_(zero_point).clamp_(params.spec.qmin, params.spec.qmax)


def dequantize(codes: Tensor, params: QParams) -> Tensor:
    """Real values of quantized ones: ``float32(q - z) * s``."""
    scale = _channelwise(params.scale, codes, params.spec.axis)
    zero_point = _channelwise(params.zero_point, codes, params.spec.axis)
    return (codes - zero_point).float() * scale


def range_of_grid(params: QParams) -> tuple[Tensor, Tensor]:
    """The range, in float64, from which `qparams_from_range` makes exactly this grid.

    >>> low, high = range_of_grid(qparams_from_range(-2.0, 10.0, QuantSpec.of_mode("asym_u", 8)))
    >>> round(low.item(), 4), round(high.item(), 4)
    (-1.9765, 10.0235)
    """
    scale, spec = params.scale.double(), params.spec
    if spec.symmetric:
        sat = scale * ((spec.qmax - spec.qmin) / 2)
        return -sat, sat
    return scale * params.low, scale * params.high


def range_of_weight(weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a weight tensor, over all of it or for each channel of `axis`.

    >>> range_of_weight(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), 0)[0]
    tensor([-2.,  3.])
    """
    if axis is None:
        return weight.amin(), weight.amax()
    flat = weight.movedim(axis, 0).flatten(1)
    return flat.amin(1), flat.amax(1)


def requant_factor(x_scale: Tensor, w_scale: Tensor, y_scale: Tensor) -> Tensor:
    """The requantization factor ``(s_x * s_w) / s_y``, float32 in this order."""
    return (x_scale * w_scale) / y_scale


def approximate_factor(factor: Tensor, bits: int) -> Tensor:
    """``mult / 2^shift``, the factor that an integer multiply of `bits` bits and a shift computes.

    ``shift = floor(log2((2^bits - 1) / M))``, ``mult = floor(M * 2^shift)``.

    >>> approximate_factor(torch.tensor([0.3]), 4)  # shift 5, mult 9
    tensor([0.2812])
    """
    exact = factor.double()
    shift = torch.floor(torch.log2((2**bits - 1) / exact))
    return (torch.floor(exact * 2**shift) / 2**shift).float()
