"""The model's parameters in the optimizer: as they are, or parts of them in the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Parts", "gradient_of", "laid_out", "part_of", "parts_of"]

Parts = Mapping[str, list[nn.Parameter]]
"""Name of a parameter of the model -> what trains in its memory: quantizers hold some parameters in pieces."""


def parts_of(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Parts:
    """The parameters of an optimizer that lie in the memory of each of the model's.

    >>> weight = nn.Parameter(torch.zeros(4, 2))
    >>> optimizer = torch.optim.SGD([nn.Parameter(weight.detach()[2:]), nn.Parameter(torch.ones(1))], lr=1.0)
    >>> [tuple(part.shape) for part in parts_of({"w": weight}, optimizer)["w"]]
    [(2, 2)]
    """
    found: dict[int, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        for each in group["params"]:
            found.setdefault(_memory(each), []).append(each)
    return {name: found.get(_memory(own), []) for name, own in parameters.items()}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def part_of(values: Tensor, own: Tensor, part: Tensor) -> Tensor:
    """What of `values`, one for each weight of `own`, is that of `part`, which lies in the memory of `own`.

    >>> own = torch.zeros(2, 2)
    >>> part_of(torch.tensor([[True, False], [False, False]]), own, own[:, 0])
    tensor([ True, False])
    """
    if part.shape == own.shape:
        return values
    values = values if values.stride() == own.stride() else laid_out(values, own)
    return values.as_strided(part.shape, part.stride(), part.storage_offset() - own.storage_offset())


def laid_out(values: Tensor, own: Tensor) -> Tensor:
    """Values on the device of a parameter, and in memory as that is."""
    return torch.empty_strided(own.shape, own.stride(), dtype=values.dtype, device=own.device).copy_(values)


def gradient_of(own: Tensor, parts: Iterable[nn.Parameter]) -> Tensor | None:
    """The gradient of a parameter, put together of those of its parts; None before the first backward pass.

    >>> own = torch.zeros(3)
    >>> part = nn.Parameter(own[1:])
    >>> part.sum().backward()
    >>> gradient_of(own, [part])
    tensor([0., 1., 1.])
    """
    with_gradient = [part for part in parts if part.grad is not None]
    if not with_gradient:
        return None
    whole = laid_out(torch.zeros_like(own), own)
    for part in with_gradient:
        assert part.grad is not None
        part_of(whole, own, part).copy_(part.grad)
    return whole
