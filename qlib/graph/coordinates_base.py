"""What a rule of `coordinates_rules` acts on, and what rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qlib.graph.coordinates_unions import PINNED, varying

__all__ = ["Rule", "Ties", "along", "first", "held_names", "opaque", "pinned", "spread"]


class Ties(Protocol):
    """What a rule acts on: the tensors of one layer, and the union-find of the graph."""

    def outputs(self, size: int) -> Tensor:
        """New labels for what the layer puts out, the same each time that it is called; one alone is pinned."""

    def attach(self, name: str, axis: int, labels: Tensor) -> None:
        """Ties an axis of a tensor of the layer, if it has that tensor."""

    def held(self, name: str) -> Tensor:
        """A label for each element of a tensor of the layer."""

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Joins the labels at the same places."""

    def pin(self, labels: Tensor) -> None:
        """Keeps all that has these labels."""

    def settled(self, labels: Tensor) -> Tensor:
        """The roots of labels, joined until they vary along one axis at most."""

    def counts(self, labels: Tensor) -> None:
        """Notes a mean, a deviation or a maximum over these: without one of them it is another one."""

    def sums(self, labels: Tensor) -> None:
        """Notes that these are summed without weights: a product of activations, or all of a tensor."""


Rule = Callable[[Ties, nn.Module, Sequence[Tensor], Sequence[int]], Tensor]
"""(ties, module, labels of the inputs, shape of the output) -> labels of the output."""


def opaque(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    for labels in inputs:
        ties.pin(labels)
    return pinned(shape)


def pinned(shape: Sequence[int]) -> Tensor:
    return torch.tensor(PINNED).expand(tuple(shape))


def along(ties: Ties, labels: Tensor, axis: int) -> Tensor:
    """The labels along an axis. Where they do not vary along it, it stays as it is: they are pinned."""
    axis %= labels.ndim
    if labels.shape[axis] > 1 and axis not in varying(labels):
        ties.pin(labels)
        return pinned(labels.shape[axis : axis + 1])
    return labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))]


def spread(found: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Labels along one axis, repeated along the others."""
    axis %= len(shape)
    return found.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(tuple(shape))


def first(labels: Tensor, axis: int) -> Tensor:
    return labels.narrow(axis, 0, 1)


def held_names(module: nn.Module) -> list[str]:
    """The constants of a function, in order."""
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return [name for name, value in sorted(held.items()) if value.is_floating_point()]
