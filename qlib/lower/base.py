"""What the exact form of every layer kind is built from.

Between layers, an integer tensor travels as **centered codes**, ``q - zero_point``, held in float32: they are exact
below 2^24, zero padding is right without further thought, and moves need not know the grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlib.quant.affine import QParams
from qlib.quant.arithmetic import float_reason
from qlib.quant.plan import LayerPlan
from qlib.registry import Registry

__all__ = [
    "EXACT_LIMIT",
    "LOWERINGS",
    "ActivationGrid",
    "ActivationGrids",
    "ExactLayer",
    "Grid",
    "Lowered",
    "LayerContext",
]

EXACT_LIMIT = 2**24
"""float32 holds every integer below this magnitude."""


@dataclass(frozen=True)
class ActivationGrid:
    """The grid of an integer tensor, and the bounds of its centered codes (tighter than the grid's after a ReLU)."""

    params: QParams
    low: int
    high: int

    @classmethod
    def of(cls, params: QParams, bounds: tuple[float, float] | None = None) -> ActivationGrid:
        """That of a per-tensor grid; `bounds` are the real values that a fused activation clamps to."""
        low, high = int(params.low), int(params.high)
        if bounds is not None:
            scale = float(params.scale)
            low = max(low, round(bounds[0] / scale))
            high = high if bounds[1] == float("inf") else min(high, round(bounds[1] / scale))
        return cls(params, low, high)

    @property
    def magnitude(self) -> int:
        """The largest magnitude of a centered code."""
        return max(-self.low, self.high)

    @property
    def scale(self) -> Tensor:
        """The scale, a float32 scalar."""
        return self.params.scale

    @property
    def zero_point(self) -> int:
        """The zero point of the codes that are deployed: they are unsigned, so a signed grid moves up by 2^(bits-1)."""
        return int(self.params.zero_point) + self.params.spec.unsigned_shift

    @property
    def dtype(self) -> torch.dtype:
        """The type of the codes that are deployed."""
        return torch.uint8 if self.params.spec.bits <= 8 else torch.uint16

    def codes(self, centered: Tensor) -> Tensor:
        """The codes that are deployed, of centered ones."""
        return (centered + self.zero_point).to(self.dtype)

    def times(self, factor: float) -> ActivationGrid:
        """The grid of the same codes, with values `factor` times as large."""
        return replace(self, params=replace(self.params, scale=self.params.scale * factor))

    def with_bounds(self, low: int, high: int) -> ActivationGrid:
        """The same grid with tighter bounds."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))


@dataclass(frozen=True)
class LayerContext:
    """One layer to lower: its float module and plan, the grids that arrive (None: float) and the one that leaves."""

    module: nn.Module
    plan: LayerPlan
    inputs: tuple[ActivationGrid | None, ...]
    output: ActivationGrid | None

    @property
    def integer(self) -> bool:
        """Whether it computes in integers: then every input arrives as codes and the output leaves as codes."""
        return not float_reason(self.module, self.plan, [_bits(grid) for grid in self.inputs], _bits(self.output))

    @property
    def accumulator_limit(self) -> float:
        """Accumulators are kept in ``-limit .. limit - 1``.

        Where a code has more than 8 bits, ONNX Runtime computes in float: 32 bits are then no limit.
        """
        weight = self.plan.weight
        wide = any(grid is not None and grid.dtype != torch.uint8 for grid in (*self.inputs, self.output))
        wide |= weight is not None and weight.spec.bits > 8
        return float("inf") if wide and self.plan.bits_accum >= 32 else 2.0 ** (self.plan.bits_accum - 1)

    def codes_in(self) -> tuple[ActivationGrid, ...]:
        """The input grids, all of which are integer."""
        grids = tuple(grid for grid in self.inputs if grid is not None)
        assert len(grids) == len(self.inputs)
        return grids


def _bits(grid: ActivationGrid | None) -> int | None:
    return None if grid is None else grid.params.spec.bits


ActivationGrids = tuple["ActivationGrid | None", ...]
"""The grids of a layer's inputs; None where one is float."""

Lowered = tuple[nn.Module, "ActivationGrid | None"]
"""The exact module, and the grid of what it returns."""

LOWERINGS: Registry[Callable[[LayerContext], Lowered]] = Registry("layer kind", "qlib.lower.ops")
"""Layer kind -> the function that builds its exact form."""


class ExactLayer(nn.Module, ABC):
    """A layer of the exact model: it knows what the exported file holds in its place."""

    @abstractmethod
    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The exported layer, between the quantized values that are deployed: float, dequantized and quantized."""


class Grid(nn.Module):
    """Rounds to an activation grid, in place: the last step of nearly every layer."""

    scale: Tensor

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.low, self.high, self.zero_point = grid.low, grid.high, grid.zero_point
        # On the tensor's device: dividing by a CPU scalar multiplies by its reciprocal on CUDA.
        self.register_buffer("scale", grid.scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Centered codes of ``x``, given in units of the scale; `x` is overwritten."""
        return torch.clamp_(x.round_(), self.low, self.high)

    def round_inside(self, x: Tensor) -> Tensor:
        """As `forward`, with the zero point inside the rounding, as some kernels have it.

        It matters on ties where it is odd, and near them where it is even: the sum is rounded as well.
        """
        if self.zero_point == 0:
            return self.forward(x)
        return self.forward(x.add_(self.zero_point).round_().sub_(self.zero_point))

    def quantize(self, x: Tensor) -> Tensor:
        """Centered codes of the real values `x`."""
        return self.forward(torch.div(x, self.scale))

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):.6g}, zero_point={self.zero_point}, codes={self.low}..{self.high}"
