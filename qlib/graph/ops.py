"""Modules that stand for functional ops in a captured graph, so that each has a name, a kind and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Add",
    "ChannelAffine",
    "Concat",
    "Function",
    "GlobalAvgPool",
    "MaskedSoftmax",
    "MatMul",
    "Move",
    "Mul",
    "Op",
    "WindowPartition",
    "WindowReverse",
]


class Op(nn.Module):
    """Base of the modules below: the tracer does not look inside."""


class Add(Op):
    """``a + b`` with broadcasting."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Mul(Op):
    """``a * b`` with broadcasting."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class ChannelAffine(nn.Conv2d):
    """``x * gain + bias`` for each channel of ``[N, C, H, W]``: a batch-norm that no layer absorbs.

    As a depthwise convolution it is computed in integers, by the kernel of convolutions.
    """

    def __init__(self, gain: Tensor, bias: Tensor) -> None:
        super().__init__(len(gain), len(gain), 1, groups=len(gain), device=gain.device, dtype=gain.dtype)
        self.weight = nn.Parameter(gain.detach().view(-1, 1, 1, 1))
        self.bias = nn.Parameter(bias.detach())


class Concat(Op):
    """Concatenation along `dim`; takes the tensors one by one."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.dim)


class MatMul(Op):
    """``alpha * a @ b``, batched; `transpose` swaps the last two axes of `b` first.

    >>> MatMul(transpose=True, alpha=0.5)(torch.ones(1, 4), torch.ones(3, 4))
    tensor([[2., 2., 2.]])
    """

    def __init__(self, *, transpose: bool = False, alpha: float = 1.0) -> None:
        super().__init__()
        self.transpose, self.alpha = transpose, alpha

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = b.transpose(-2, -1) if self.transpose else b
        return torch.matmul(a * self.alpha if self.alpha != 1.0 else a, b)


class GlobalAvgPool(Op):
    """Mean over the two spatial axes of ``[N, C, H, W]``."""

    def __init__(self, *, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keepdim)


class Function(Op):
    """A function computed in float: `template` holds its arguments, with ``Slot(i)`` for the i-th tensor input."""

    class Slot(int):
        """The place of a tensor input in `template`."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        constants: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, tuple(args), dict(kwargs)
        for index, value in enumerate(constants):
            self.register_buffer(f"constant_{index}", value.detach())

    def forward(self, *tensors: Tensor) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, Function.Slot):
                return tensors[value] if value >= 0 else getattr(self, f"constant_{-1 - value}")
            if isinstance(value, (list, tuple)):
                return type(value)(fill(item) for item in value)
            return value

        return self.function(*map(fill, self.args), **{key: fill(value) for key, value in self.kwargs.items()})

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", str(self.function))


class Move(Op):
    """Base of the modules that only move values (and may pad with zeros): codes go through them unchanged."""


class WindowPartition(Move):
    """``[N, H, W, C] -> [N * windows, h * w, C]``: pads to whole windows, rolls by `shift`, cuts (Swin, sec. 3.2)."""

    def __init__(self, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__()
        self.window, self.shift = tuple(window), tuple(shift)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        (h, w), (rows, columns) = self.window, window_grid((height, width), self.window)
        if (rows * h, columns * w) != (height, width):
            x = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * h - height))
        shift = effective_shift((height, width), self.window, self.shift)
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = x.reshape(n, rows, h, columns, w, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(n * rows * columns, h * w, channels)


class WindowReverse(Move):
    """The inverse of `WindowPartition`; `shape` is that of the tensor that was partitioned."""

    def __init__(self, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__()
        self.window, self.shift = tuple(window), tuple(shift)

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        n, height, width, _ = shape
        (h, w), (rows, columns) = self.window, window_grid((height, width), self.window)
        x = x.reshape(n, rows, columns, h, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, rows * h, columns * w, -1)
        shift = effective_shift((height, width), self.window, self.shift)
        if any(shift):
            x = torch.roll(x, shift, (1, 2))
        return x[:, :height, :width, :].contiguous()


class MaskedSoftmax(Op):
    """Softmax of window attention ``[N * windows, heads, P, P]``: positions that the roll brought together are masked.

    The mask adds -100, as Swin does, before the softmax over the last axis.
    """

    def __init__(self, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__()
        self.window, self.shift, self.dim = tuple(window), tuple(shift), -1

    def mask(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """``[windows, 1, P, P]`` of 0 and -100, or None where nothing was rolled; `shape` is ``[N, H, W, C]``."""
        size = (int(shape[1]), int(shape[2]))
        shift = effective_shift(size, self.window, self.shift)
        if not any(shift):
            return None
        (h, w), (rows, columns) = self.window, window_grid(size, self.window)

        def region(length: int, window: int, moved: int) -> Tensor:
            position = torch.arange(length, device=device)
            return (position >= length - window).long() + (position >= length - moved).long() * (moved > 0)

        ids = region(rows * h, h, shift[0])[:, None] * 3 + region(columns * w, w, shift[1])[None, :]
        ids = ids.view(rows, h, columns, w).permute(0, 2, 1, 3).reshape(rows * columns, h * w)
        return ((ids[:, None, :] != ids[:, :, None]) * -100.0)[:, None]

    def masked(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """`x` with the mask added."""
        mask = self.mask(shape, x.device)
        if mask is None:
            return x
        windows = mask.shape[0]
        return (x.reshape(-1, windows, *x.shape[1:]) + mask).reshape(x.shape)

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.softmax(self.masked(x, shape), -1)


def window_grid(size: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of windows that cover an image of `size`.

    >>> window_grid((14, 15), (7, 7))
    (2, 3)
    """
    return -(-size[0] // window[0]), -(-size[1] // window[1])


def effective_shift(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """The shift along each axis; none along an axis that one window covers.

    >>> effective_shift((14, 7), (7, 7), (3, 3))
    (3, 0)
    """
    rows, columns = window_grid(size, window)
    return (shift[0] if rows > 1 else 0, shift[1] if columns > 1 else 0)
