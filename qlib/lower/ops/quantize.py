"""QuantizeLinear and DequantizeLinear: where the graph goes from float to integers and back."""

from __future__ import annotations

from torch import Tensor, nn

from qlib.lower.base import ActivationGrid, Grid

__all__ = ["Dequantize", "Quantize"]


class Quantize(nn.Module):
    """Float -> centered codes: ``clamp(round(x / s) + z) - z``."""

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.grid = Grid(grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.quantize(x)


class Dequantize(nn.Module):
    """Centered codes -> float: ``(q - z) * s``."""

    scale: Tensor

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        return codes * self.scale
