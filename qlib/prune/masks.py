"""Masks: for each pruned parameter of a model, which of its weights are kept.

A mask is a bool tensor of the shape of its parameter, true where the weight is kept; those of a model are a dictionary
by the names of its parameters. A parameter without a mask is kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qlib.errors import CheckpointError, did_you_mean

__all__ = ["Masks", "apply_masks", "check_masks", "joined", "masked_count", "masks_of_zeros", "parameters_by_name"]
__all__ += ["sparsity", "unmasked"]

Masks: TypeAlias = dict[str, Tensor]
"""Name of a parameter in the user's model -> bool tensor of its shape, true where a weight is kept."""


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model; one that two layers share has the names of both."""
    return dict(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the weights that are not kept to zero, in place.

    Law: afterwards they are +0, whatever they were, and no other weight has changed.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[2.0, float("nan")]])
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
    >>> layer.weight.tolist()
    [[2.0, 0.0]]
    """
    parameters = parameters_by_name(model)
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0.0)


def check_masks(model: nn.Module, masks: Mapping[str, Tensor], source: str) -> None:
    """Holds the names and shapes of masks to a model; the sentence begins with `source`.

    >>> check_masks(nn.Linear(2, 1), {"weigth": torch.ones(1, 2, dtype=torch.bool)}, "'a'")
    Traceback (most recent call last):
    qlib.errors.CheckpointError: 'a' has a mask of 'weigth', which the model does not have; did you mean weight?

    Raises:
        CheckpointError: a mask is of no parameter of the model, or not of its shape.
    """
    problem = next(_problems(parameters_by_name(model), masks), None)
    if problem is not None:
        raise CheckpointError(f"{source} {problem}")


def _problems(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Iterator[str]:
    for name, mask in masks.items():
        if name not in parameters:
            yield f"has a mask of {name!r}, which the model does not have{did_you_mean(name, parameters)}"
        elif mask.shape != parameters[name].shape:
            theirs, ours = (_shape(each) for each in (mask, parameters[name]))
            yield f"has a mask of {theirs} for {name!r}, whose shape is {ours}; give the model that was pruned"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def masks_of_zeros(model: nn.Module) -> Masks:
    """The masks that keep what is not zero now, of those weights of 2 or more axes that hold a zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[2.0, 0.0]])
    >>> masks_of_zeros(layer)
    {'weight': tensor([[ True, False]])}
    """
    kept = {name: value.detach() != 0 for name, value in model.named_parameters() if value.ndim > 1}
    return {name: mask for name, mask in kept.items() if not bool(mask.all())}


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Masks:
    """The masks that keep what both keep.

    >>> joined({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, True])})
    {'w': tensor([ True, False, False])}
    """
    return {**first, **{name: mask & first[name] if name in first else mask for name, mask in second.items()}}


def sparsity(tensor: Tensor) -> float:
    """The share of a tensor's values that are zero; of a mask, the share that is not kept.

    >>> sparsity(torch.tensor([0.0, 1.0, -0.0, 2.0])), sparsity(torch.tensor([True, False])), sparsity(torch.empty(0))
    (0.5, 0.5, 0.0)
    """
    return 1 - int(tensor.count_nonzero()) / tensor.numel() if tensor.numel() else 0.0


def masked_count(masks: Mapping[str, Tensor]) -> int:
    """How many weights masks zero.

    >>> masked_count({"w": torch.tensor([True, False, False]), "v": torch.tensor([False])})
    3
    """
    return sum(int((~mask).sum()) for mask in masks.values())


def unmasked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """For each parameter, how many of the weights that its mask zeroes are not zero; only those with any.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[2.0, 3.0]])
    >>> unmasked(layer, {"weight": torch.tensor([[True, False]])})
    {'weight': 1}
    """
    parameters = parameters_by_name(model)
    left = {name: int((parameters[name].detach()[~mask] != 0).sum()) for name, mask in masks.items()}
    return {name: count for name, count in left.items() if count}
