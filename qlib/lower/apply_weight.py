"""The arithmetic of a weighted layer as a value: a function of input, weight and bias, which tells its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from qlib.graph.weights import swap_groups

__all__ = ["ApplyWeight", "padding_of"]


@dataclass(frozen=True)
class ApplyWeight:
    """What a convolution, a transposed convolution or a linear layer computes from its input, weight and bias.

    `axes` is the number of axes of the kernel, 0 of a linear layer; the weight is ``[out, in / groups, ...]``, for
    transposed ones too. Padding with other values than zeros is no part of it: see `padding_of`.

    >>> import torch
    >>> layer = nn.Conv1d(1, 1, 2, padding=1)
    >>> apply, x = ApplyWeight.of(layer), torch.ones(1, 1, 3)
    >>> torch.equal(apply(x, layer.weight, layer.bias), layer(x)), apply.padding
    (True, (1,))
    """

    axes: int = 0
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> ApplyWeight:
        """That of a layer."""
        if isinstance(module, nn.Linear):
            return cls()
        assert isinstance(module, nn.modules.conv._ConvNd)
        zeros = module.padding_mode == "zeros"
        return cls(
            module.weight.ndim - 2,
            module.transposed,
            module.stride,
            module.padding if zeros else (0,) * len(module.stride),
            module.output_padding,
            module.dilation,
            module.groups,
        )

    @property
    def splittable(self) -> bool:
        """Whether input channels can be computed apart, and the results added."""
        return not self.transposed and self.groups == 1

    @property
    def pads(self) -> tuple[tuple[int, int], ...] | None:
        """Zeros before and after each axis; None where they follow from the kernel (``same``)."""
        if self.padding == "same":
            return None
        sizes = (0,) * self.axes if isinstance(self.padding, str) else self.padding
        return tuple((size, size) for size in sizes)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.axes == 0:
            return F.linear(x, weight, bias)
        index = self.axes - 1
        if self.transposed:
            assert not isinstance(self.padding, str)
            transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[index]
            swapped = swap_groups(weight, self.groups)
            return transposed(
                x, swapped, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        convolution = (F.conv1d, F.conv2d, F.conv3d)[index]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Pad(nn.Module):
    """Padding with copies of values: reflect, replicate or circular."""

    def __init__(self, pads: Sequence[int], mode: str) -> None:
        super().__init__()
        self.pads, self.mode = tuple(pads), mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, self.mode)


def padding_of(module: nn.Module) -> nn.Module | None:
    """The padding that is no part of the convolution: one that does not fill with zeros."""
    mode = getattr(module, "padding_mode", "zeros")
    if mode == "zeros":
        return None
    assert isinstance(module, nn.modules.conv._ConvNd)
    return _Pad(module._reversed_padding_repeated_twice, mode)
