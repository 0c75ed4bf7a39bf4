"""The model's parameters in the optimizer: as they are, or parts of them in the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Parts", "gradient_of", "laid_out", "moments_of", "part_of", "parts_of", "set_moments"]

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
    gradients = [(part, part.grad) for part in parts if part.grad is not None]
    return _whole(own, gradients) if gradients else None


def _whole(own: Tensor, values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Values of parts, put together; 0 where there are none."""
    whole = laid_out(torch.zeros_like(own), own)
    for part, value in values:
        part_of(whole, own, part).copy_(value)
    return whole


def moments_of(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """What an optimizer keeps, by its own name and by that of the parameter; numbers are those of the first part."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parts in parts_of(parameters, optimizer).items():
        own = parameters[name].detach()
        kept = [(part, optimizer.state[part]) for part in parts if part in optimizer.state]
        for key, first in kept[0][1].items() if kept else ():
            if isinstance(first, Tensor):
                whole = _whole(own, [(part, each[key]) for part, each in kept]) if first.ndim else first
                found.setdefault(key, {})[name] = whole
    return found


def set_moments(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Gives an optimizer what `moments_of` tells of another one."""
    trained = parts_of(parameters, optimizer)
    for key, values in moments.items():
        for name, value in values.items():
            for part in trained[name]:
                mine = part_of(value, parameters[name], part) if value.ndim else value
                optimizer.state[part][key] = torch.empty_like(part if value.ndim else value).copy_(mine)
