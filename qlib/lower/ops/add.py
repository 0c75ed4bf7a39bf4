"""Sum of two tensors, as ONNX Runtime's QLinearAdd computes it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from qlib.graph.ops import Add
from qlib.lower.base import LOWERINGS, ActivationGrid, ActivationGrids, ExactLayer, Grid, LayerContext, Lowered
from qlib.lower.ops.float_op import lower_float
from qlib.lower.qdq_layer import QdqLayer

__all__ = ["ExactAdd", "fma"]


def fma(a: float, x: Tensor, c: Tensor) -> Tensor:
    """``a * x + c`` with one rounding, float32; `a` is a float32 value, `x` and `c` are overwritten or copied.

    >>> x, c = torch.tensor([1 + 2**-12]), torch.tensor([-1.0])
    >>> fma(1 + 2**-12, x, c).item() == 2**-11 + 2**-24, (x * (1 + 2**-12) + c).item() == 2**-11
    (True, True)
    """
    if _add_is_fused(x.device.type):
        return torch.add(c, x, alpha=a)
    return (x.double() * a + c.double()).float()


@functools.cache
def _add_is_fused(device: str) -> bool:
    """Whether ``torch.add(c, x, alpha=a)`` rounds once on this device, in its vector body and in its tail alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-255, 256, (4099,), generator=generator).float().to(device)
    c = torch.randn(4099, generator=generator).to(device)
    exact = [(x.double() * a + c.double()).float() for a in _PROBES]
    fused = [torch.add(c, x, alpha=a) for a in _PROBES]
    scalar = [torch.add(c[0], x, alpha=a) for a in _PROBES]
    exact_scalar = [(x.double() * a + c[0].double()).float() for a in _PROBES]
    return all(map(torch.equal, exact, fused)) and all(map(torch.equal, exact_scalar, scalar))


_PROBES = tuple(torch.tensor([0.3, 1.7, 0.7071067, 0.0123]).tolist())


class ExactAdd(ExactLayer):
    """``sat(rint(fma(r_a, q_a, fma(r_b, q_b, f))))`` with ``r = s_x / s_y``, ``f = z_y - fma(r_a, z_a, r_b * z_b)``.

    On raw codes: the zero point is inside the rounding. Where the first input is broadcast the two swap roles. The
    factors of the inputs are in their scales.
    """

    constant: Tensor
    swapped: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        assert context.output is not None
        assert isinstance(context.module, Add)
        self.factors = context.module.factors
        a, b = (grid.times(factor) for grid, factor in zip(context.codes_in(), self.factors, strict=True))
        self.grid = Grid(context.output)
        self.zeros = (a.zero_point, b.zero_point)
        self.ratios = tuple(float(grid.scale / context.output.scale) for grid in (a, b))
        self.register_buffer("constant", self._constant(a, b, context.output), persistent=False)
        self.register_buffer("swapped", self._constant(b, a, context.output), persistent=False)

    @staticmethod
    def _constant(a: ActivationGrid, b: ActivationGrid, y: ActivationGrid) -> Tensor:
        ratio_a, ratio_b = a.scale / y.scale, b.scale / y.scale
        inner = fma(float(ratio_a), torch.tensor(float(a.zero_point)), ratio_b * b.zero_point)
        return y.zero_point - inner

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (ratio_a, ratio_b), (zero_a, zero_b), constant = self.ratios, self.zeros, self.constant
        if a.numel() < b.numel():
            a, b, constant = b, a, self.swapped
            ratio_a, ratio_b, zero_a, zero_b = ratio_b, ratio_a, zero_b, zero_a
        inner = fma(ratio_b, b + zero_b if zero_b else b, constant)
        y = fma(ratio_a, a + zero_a if zero_a else a, inner).round_()
        zero_y = self.grid.zero_point
        return (y.sub_(zero_y) if zero_y else y).clamp_(self.grid.low, self.grid.high)

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize; the factors are in the scales."""
        return QdqLayer(Add(), inputs, output, factors=dict(enumerate(self.factors)))


@LOWERINGS.register("add")
def lower_add(context: LayerContext) -> Lowered:
    """The exact form where the kind has one for these codes; in float otherwise."""
    return (ExactAdd(context), context.output) if context.integer else lower_float(context)
