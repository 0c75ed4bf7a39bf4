"""Weights and biases of weighted layers: their layouts, output channels, and biases for layers that have none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["channel_axis", "give_bias", "grouped", "over_channels", "swap_channels", "swap_groups"]


def swap_channels(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as ``[out, in / groups, ...]``, and back: a transposed layer holds ``[in, out / groups, ...]``.

    >>> swap_channels(nn.ConvTranspose1d(4, 6, 3, groups=2), torch.zeros(4, 3, 3)).shape
    torch.Size([6, 2, 3])
    """
    return swap_groups(weight, module.groups) if isinstance(module, nn.modules.conv._ConvTransposeNd) else weight


def swap_groups(weight: Tensor, groups: int) -> Tensor:
    """``[in, out / groups, ...]`` to ``[out, in / groups, ...]``, and back."""
    by_group = weight.view(groups, -1, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)


def grouped(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, copied, as ``[groups, out / groups, in / groups, kernel]``.

    >>> grouped(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
    torch.Size([2, 3, 2, 9])
    """
    groups = getattr(module, "groups", 1)
    rows = swap_channels(module, weight).contiguous()
    return rows.view(groups, rows.shape[0] // groups, rows.shape[1], -1).clone()


def give_bias(module: nn.Module) -> Tensor:
    """The bias of a weighted layer, which gets one of zeros if it has none.

    >>> give_bias(nn.Linear(3, 2, bias=False))
    Parameter containing:
    tensor([0., 0.], requires_grad=True)
    """
    if not isinstance(module.bias, Tensor):
        assert isinstance(module.weight, Tensor)
        outputs = swap_channels(module, module.weight).shape[0]
        module.bias = nn.Parameter(torch.zeros(outputs, dtype=module.weight.dtype, device=module.weight.device))
    bias: Tensor = module.bias
    return bias


def channel_axis(module: nn.Module) -> int:
    """The axis of a layer's channels, in its input and in its output: last for linear layers and layer norms.

    >>> channel_axis(nn.Conv2d(1, 1, 1)), channel_axis(nn.Linear(1, 1))
    (1, -1)
    """
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def over_channels(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a weighted layer as ``[values, channels]``."""
    return y.movedim(channel_axis(module), -1).flatten(0, -2)
