"""Group lasso of channel classes: all that belongs to a channel goes to zero together, so that it can be removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from qlib.config.schedule.keys import FROM_0, key
from qlib.config.schedule.pruning_keys import needed
from qlib.graph.coordinates import ChannelAxis, ChannelClasses
from qlib.regularize._base import REGULARIZERS, Regularizer

__all__ = ["ClassLasso"]

_TINY = 1e-8


@REGULARIZERS.register("ChannelLassoRegularizer")
@dataclass(frozen=True, kw_only=True)
class ClassLasso(Regularizer):
    """``strength * sum over classes of the L2 norm of all their weights``: rows, columns, batch-norms and biases.

    With a threshold the classes go after each step, for good, the root mean square of whose weights is not above it.

    >>> import torch
    >>> axes = (ChannelAxis("a", 0, torch.tensor([1, 2])), ChannelAxis("b", 1, torch.tensor([1, 2])))
    >>> weights = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[4.0, 0.1]])}
    >>> lasso = ClassLasso(strength=1.0, threshold=0.2, axes=axes)
    >>> round(float(lasso.total(weights)), 2), lasso.masks(weights)["b"]
    (5.1, tensor([[ True, False]]))
    """

    needs_classes: ClassVar[bool] = True
    lasting: ClassVar[bool] = True

    strength: float = needed(FROM_0)
    threshold: float = key(0.0, FROM_0)
    axes: Sequence[ChannelAxis] = field(default=(), metadata={"value": None})

    @property
    def names(self) -> Sequence[str]:
        return tuple(dict.fromkeys(each.name for each in self.axes))

    def with_classes(self, classes: ChannelClasses, parameters: Mapping[str, Tensor]) -> ClassLasso:
        mine = (each for each in classes.axes if each.name in parameters)
        return replace(self, axes=tuple(each for each in mine if _fits(each, parameters[each.name])))

    def loss(self, name: str, weight: Tensor) -> Tensor:
        raise AssertionError("the loss is that of all weights together")

    def total(self, weights: Mapping[str, Tensor]) -> Tensor:
        squares, _ = self._sums(weights)
        return self.strength * (squares[1:] + _TINY).sqrt().sum()

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.threshold:
            return {}
        squares, counts = self._sums(weights)
        kept = squares > self.threshold**2 * counts
        kept[0] = True
        found: dict[str, Tensor] = {}
        for each in self.axes:
            weight = weights[each.name]
            mine = kept[each.classes.to(weight.device)].view(_along(each, weight)).expand(weight.shape)
            found[each.name] = found[each.name] & mine if each.name in found else mine
        return found

    def _sums(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of squares of each class, and of how many weights that are not zero; at 0 what belongs to none.

        Those that are zero do not count: where one class goes, others that share weights with it must not follow.
        """
        first = next(iter(weights.values()))
        count = 1 + max(int(each.classes.max()) for each in self.axes)
        squares, counts = first.new_zeros(count), first.new_zeros(count)
        for each in self.axes:
            rows = weights[each.name].movedim(each.axis, 0).reshape(len(each.classes), -1)
            classes = each.classes.to(first.device)
            squares = squares.index_add(0, classes, rows.square().sum(1))
            counts = counts.index_add(0, classes, (rows != 0).sum(1).to(first.dtype))
        return squares, counts


def _fits(axis: ChannelAxis, weight: Tensor) -> bool:
    return weight.ndim > axis.axis and weight.shape[axis.axis] == len(axis.classes)


def _along(axis: ChannelAxis, weight: Tensor) -> list[int]:
    return [-1 if index == axis.axis else 1 for index in range(weight.ndim)]
