"""Biases: for layers that have none, and by layer and channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.graph.channels import channel_axis
from qlib.lower.ops.weighted import swap_channels

__all__ = ["give_bias", "over_channels"]


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


def over_channels(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a weighted layer as ``[values, channels]``."""
    return y.movedim(channel_axis(module), -1).flatten(0, -2)
