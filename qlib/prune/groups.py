"""Groups of weights: the filters, channels, rows, kernels or blocks of a tensor, which live and die together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CRITERIA", "GROUP_TYPES", "Groups"]

_SUMMED: Mapping[str, tuple[int, tuple[int, ...] | None]] = {
    "Filters": (2, (0,)),
    "3D": (2, (0,)),
    "Channels": (2, (1,)),
    "Rows": (2, (0,)),
    "Cols": (2, (1,)),
    "Columns": (2, (1,)),
    "2D": (3, (0, 1)),
    "4D": (2, ()),
    "Blocks": (2, None),
}
"""Type -> how many axes a weight needs, and the axes along which its groups are counted."""

GROUP_TYPES = tuple(_SUMMED)
"""Names in a schedule. A 3D group is a filter; a 4D group is the whole tensor; a 2D group is one kernel."""


CRITERIA = ("Max", "Mean_Abs")
"""What of a group is compared with a threshold."""


@dataclass(frozen=True)
class Groups:
    """The groups of one type; `block` is what a block spans: filters and channels.

    >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> Groups("Filters").norms(weight, 2).flatten().tolist(), Groups("Channels").norms(weight, 1).flatten().tolist()
    ([5.0, 1.0], [3.0, 5.0])
    """

    kind: str
    block: tuple[int, int] = (1, 1)

    def problem(self, weight: Tensor) -> str:
        """Why a weight has no such groups; empty if it has."""
        shape, axes = "x".join(map(str, weight.shape)), _SUMMED[self.kind][0]
        if weight.ndim < axes:
            return f"has the shape {shape}, and groups of type {self.kind} need {axes} axes"
        if self.kind in ("Rows", "Cols", "Columns") and weight.ndim != 2:
            return f"has the shape {shape}, and {self.kind} are those of a linear layer; write Filters or Channels"
        if self.kind == "Blocks" and (weight.shape[0] % self.block[0] or weight.shape[1] % self.block[1]):
            return f"has the shape {shape}, which blocks of {self.block[0]}x{self.block[1]} do not divide"
        return ""

    def norms(self, weight: Tensor, p: float) -> Tensor:
        """The norm ``(sum |w|^p)^(1/p)`` of each group, in a tensor that `spread` takes."""
        view = self._view(weight)
        found: Tensor = torch.linalg.vector_norm(view, p, self._inside(view), keepdim=True)
        return found

    def sums(self, values: Tensor) -> Tensor:
        """The sum of each group, in a tensor that `spread` takes."""
        view = self._view(values)
        return view.sum(self._inside(view), keepdim=True)

    def strength(self, weight: Tensor, criterion: str) -> Tensor:
        """What of each group is compared with a threshold: its largest magnitude, or the mean.

        >>> Groups("Filters").strength(torch.tensor([[1.0, -3.0]]), "Mean_Abs")
        tensor([[2.]])
        """
        return self.norms(weight, math.inf) if criterion == "Max" else self.norms(weight, 1) / self.size(weight)

    def size(self, weight: Tensor) -> int:
        """How many weights a group has."""
        return weight.numel() // self.norms(weight.detach(), 1).numel()

    def spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """The mask of a weight that keeps these groups of it.

        >>> Groups("Blocks", (1, 2)).spread(torch.tensor([[[[True], [False]]]]), torch.ones(1, 4))
        tensor([[ True,  True, False, False]])
        """
        return kept.expand(self._view(weight).shape).reshape(weight.shape)

    def _view(self, weight: Tensor) -> Tensor:
        """The weight, the axes of its blocks apart from those inside of them."""
        if self.kind != "Blocks":
            return weight
        (rows, columns), shape = self.block, weight.shape
        return weight.reshape(shape[0] // rows, rows, shape[1] // columns, columns, *shape[2:])

    def _inside(self, view: Tensor) -> tuple[int, ...]:
        """The axes of a view that are inside a group."""
        outside = _SUMMED[self.kind][1]
        if outside is None:
            return (1, 3)
        return tuple(axis for axis in range(view.ndim) if axis not in outside)
