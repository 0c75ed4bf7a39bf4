"""What the integer kernels compute, in plain numpy: int64 accumulators, then float32 in the kernels' order.

Written from the formulas of ONNX Runtime's kernels, independently of the code under test.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlib.lower.base import ActivationGrid
from qlib.quant.affine import QParams
from qlib.quant.spec import QuantSpec

f32 = np.float32
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """A grid: scale, zero point, and the smallest and largest code."""

    scale: np.float32
    zero: int
    low: int
    high: int
    mode: str = "asym_u"
    bits: int = 8

    @classmethod
    def of(cls, mode: str, bits: int, scale: float, zero: int = 0) -> Codes:
        """`zero` counts from the lowest code in asymmetric modes, and is 0 in symmetric ones."""
        if mode == "asym_u":
            return cls(f32(scale), zero, 0, 2**bits - 1, mode, bits)
        low, high = -(2 ** (bits - 1)) + (mode == "sym_restr"), 2 ** (bits - 1) - 1
        return cls(f32(scale), zero + low if mode == "asym_s" else 0, low, high, mode, bits)

    @property
    def grid(self) -> ActivationGrid:
        """The same grid, as the code under test knows it."""
        spec = QuantSpec.of_mode(self.mode, self.bits)
        assert (spec.qmin, spec.qmax) == (self.low, self.high)
        return ActivationGrid.of(QParams(torch.tensor(self.scale), torch.tensor(self.zero, dtype=torch.int32), spec))

    @property
    def deployed(self) -> Codes:
        """The grid as it is deployed, with unsigned codes: a signed one moves up by ``2^(bits-1)``."""
        up = 0 if self.mode == "asym_u" else 2 ** (self.bits - 1)
        return Codes(self.scale, self.zero + up, self.low + up, self.high + up, self.mode, self.bits)

    def bounded(self, top: float) -> tuple[int, int]:
        """The codes of a fused activation that clamps to ``0 .. top``."""
        high = self.high if np.isinf(top) else min(self.high, int(np.rint(f32(top) / self.scale)) + self.zero)
        return max(self.low, self.zero), high

    def random(self, rng: np.random.Generator, *shape: int) -> Ints:
        """Random codes; the ends of the range are among them."""
        codes = rng.integers(self.low, self.high + 1, shape)
        codes.flat[:2] = self.low, self.high
        return codes

    def centered(self, codes: Ints) -> Tensor:
        """How codes travel between lowered layers."""
        return torch.from_numpy(codes - self.zero).float()

    def saturate(self, rounded: Floats) -> Ints:
        """``sat(rint(...) + z)``, of a value that was rounded."""
        return np.clip(rounded.astype(np.int64) + self.zero, self.low, self.high)


def requantize(acc: Ints, factor: Floats | np.float32, y: Codes) -> Ints:
    """``sat(rint(float32(acc) * factor) + z)``."""
    return y.saturate(np.rint(acc.astype(f32) * factor))


def quantize(x: Floats, y: Codes) -> Ints:
    """``sat(rint(x / s) + z)``."""
    return y.saturate(np.rint(x / y.scale))


def weight_grid(weight: Floats, mode: str, bits: int, per_channel: bool) -> tuple[Floats, Ints, Ints]:
    """Scale and zero point (one for each output channel, the first axis, or one) and codes of a weight."""
    flat = weight.reshape(len(weight), -1) if per_channel else weight.reshape(1, -1)
    low, high = flat.min(1).astype(np.float64), flat.max(1).astype(np.float64)
    grid = Codes.of(mode, bits, 1.0)
    if mode.startswith("sym"):
        steps = 2 ** (bits - 1) - 1 if mode == "sym_restr" else (2**bits - 1) / 2
        scale = (np.maximum(abs(low), abs(high)) / steps).astype(f32)
        zero = np.zeros(len(scale), np.int64)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = ((high - low) / (2**bits - 1)).astype(f32)
        zero = grid.low - np.rint(low / scale.astype(np.float64)).astype(np.int64)
    column = [-1, *[1] * (weight.ndim - 1)]
    codes = np.rint(weight / scale.reshape(column)).astype(np.int64) + zero.reshape(column)
    return scale, zero.reshape(column), np.clip(codes, grid.low, grid.high)


def conv(x: Ints, w: Ints, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Ints:
    """Convolution of integers: ``x [N, C, *S]``, ``w [O, C / groups, *K]``; pads with 0."""
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    kernel, batch, out = w.shape[2:], x.shape[0], w.shape[0]
    sizes = [(s - d * (k - 1) - 1) // t + 1 for s, d, k, t in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
    acc = np.zeros((batch, groups, out // groups, *sizes), np.int64)
    for at in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(k * d, k * d + t * (n - 1) + 1, t) for k, d, t, n in zip(at, dilation, stride, sizes, strict=True)
        )
        part = x[(slice(None), slice(None), *window)].reshape(batch, groups, -1, *sizes)
        taps = w[(slice(None), slice(None), *at)].reshape(groups, out // groups, -1)
        acc += np.einsum("ngc...,goc->ngo...", part, taps)
    return acc.reshape(batch, out, *sizes)


def conv_transpose(
    x: Ints,
    w: Ints,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Ints:
    """Transposed convolution of integers: ``x [N, C, *S]``, ``w [C, O / groups, *K]``."""
    kernel, batch, per_group = w.shape[2:], x.shape[0], w.shape[1]
    axes = zip(x.shape[2:], stride, dilation, kernel, output_padding, strict=True)
    sizes = [(n - 1) * t + d * (k - 1) + 1 + extra for n, t, d, k, extra in axes]
    acc = np.zeros((batch, groups, per_group, *sizes), np.int64)
    parts = x.reshape(batch, groups, -1, *x.shape[2:])
    for at in itertools.product(*map(range, kernel)):
        taps = w[(slice(None), slice(None), *at)].reshape(groups, -1, per_group)
        where = tuple(
            slice(k * d, k * d + t * (n - 1) + 1, t)
            for k, d, t, n in zip(at, dilation, stride, x.shape[2:], strict=True)
        )
        acc[(slice(None), slice(None), slice(None), *where)] += np.einsum("ngc...,gco->ngo...", parts, taps)
    crop = tuple(slice(p, n - p) for p, n in zip(padding, sizes, strict=True))
    return acc.reshape(batch, groups * per_group, *sizes)[(slice(None), slice(None), *crop)]


def fma(a: Floats | np.float32, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """``a * b + c``, rounded once."""
    return np.asarray(np.float64(a) * np.float64(b) + np.float64(c)).astype(f32)


def add(qa: Ints, a: Codes, qb: Ints, b: Codes, y: Codes) -> Ints:
    """QLinearAdd, for a first input that is not the broadcast one."""
    ra, rb = a.scale / y.scale, b.scale / y.scale
    constant = f32(y.zero) - fma(ra, f32(a.zero), rb * f32(b.zero))
    total = fma(ra, qa.astype(f32), fma(rb, qb.astype(f32), constant))
    return np.clip(np.rint(total).astype(np.int64), y.low, y.high)


def mul(qa: Ints, a: Codes, qb: Ints, b: Codes, y: Codes) -> Ints:
    """QLinearMul."""
    product = ((qa - a.zero) * (qb - b.zero)).astype(f32) * ((a.scale * b.scale) / y.scale)
    return np.clip(np.rint(product + f32(y.zero)).astype(np.int64), y.low, y.high)


def softmax(q: Ints, x: Codes, y: Codes) -> Ints:
    """QLinearSoftmax over the last axis."""
    scale, size = float(x.scale), q.shape[-1]
    room = float(f32(np.log(f32(np.finfo(f32).max / size)))) - 5
    table = np.exp((np.arange(256) - 255 + max(0.0, room) / scale) * scale).astype(f32)
    e = table[q + 255 - q.max(-1, keepdims=True)]
    total = np.zeros(q.shape[:-1], f32)
    for column in np.moveaxis(e, -1, 0):
        total = total + column
    steps = f32(np.floor(f32(1) / y.scale))
    with np.errstate(over="ignore"):  # in rows of one element
        rounded = np.rint(e * steps / total[..., None])
    return np.minimum(rounded + y.zero, 255).astype(np.int64)
