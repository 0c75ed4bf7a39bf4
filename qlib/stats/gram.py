"""Second moments of what a weighted layer sees: ``sum x x^T`` over the columns that its weight is multiplied with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["columns", "gram"]


def gram(module: nn.Module, x: Tensor, other: Tensor | None = None) -> Tensor:
    """``sum x y^T`` over all positions of the images, ``[groups, in, in]`` in float64; y is x without another input.

    >>> gram(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[[1., 2.],
             [2., 5.]]], dtype=torch.float64)
    """
    seen = columns(module, x)
    return (seen.transpose(1, 2) @ (seen if other is None else columns(module, other))).double()


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with, ``[groups, positions, in * kernel]``."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    groups = getattr(module, "groups", 1)
    return torch.unflatten(_patches(module, x), 1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """The values under the kernel at each of its positions, ``[N, in * kernel, positions]``."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    padding = [size for size in reversed(module._reversed_padding_repeated_twice[::2]) for _ in (0, 1)][::-1]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode) if any(padding) else x
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        count = (x.shape[axis] - dilation * (size - 1) - 1) // stride + 1
        starts = torch.arange(count, device=x.device) * stride
        index = (starts[:, None] + torch.arange(size, device=x.device) * dilation).flatten()
        x = torch.unflatten(x.index_select(axis, index), axis, (count, size))
        x = x.movedim(axis + 1, -1)  # what stays at `axis` are the positions; the kernel's places go last
    dims = len(module.kernel_size)
    return x.movedim(tuple(range(2 + dims, 2 + 2 * dims)), tuple(range(2, 2 + dims))).flatten(1, 1 + dims).flatten(2)
