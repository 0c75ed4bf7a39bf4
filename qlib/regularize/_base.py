"""What a regularizer of a schedule is: from weights to a loss, and to what has become small enough to go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qlib.config.schedule.keys import ClassFields
from qlib.config.schedule.pruning_keys import NAMING, class_fields
from qlib.graph.coordinates import ChannelClasses
from qlib.prune.groups import Groups
from qlib.registry import Registry

__all__ = ["REGULARIZERS", "Regularizer", "group_problem", "regularizer_classes"]


class Regularizer(ABC):
    """A regularizer: a frozen dataclass whose fields are the keys of its YAML component."""

    lasting: ClassVar[bool] = False
    """Whether what it lets go does not come back."""

    needs_classes: ClassVar[bool] = False
    """Whether it acts on the channel classes of a model."""

    @property
    def names(self) -> Sequence[str]:
        """The parameters that it acts on."""
        return tuple(next(getattr(self, key) for key in NAMING if hasattr(self, key)))

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        """Why it cannot act on these weights, after the name of one of them; empty if it can."""
        return ""

    def with_classes(self, classes: ChannelClasses, parameters: Mapping[str, Tensor]) -> Regularizer:
        """The regularizer over the channel classes of a model, where `needs_classes`."""
        return self

    def total(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The loss of all its weights."""
        return torch.stack([self.loss(name, weight) for name, weight in weights.items()]).sum()

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of what is not small enough to go, of those weights of which something may."""
        found = {name: self.kept(name, weight) for name, weight in weights.items()}
        return {name: mask for name, mask in found.items() if mask is not None}

    @abstractmethod
    def loss(self, name: str, weight: Tensor) -> Tensor:
        """The loss of one weight."""

    def kept(self, name: str, weight: Tensor) -> Tensor | None:
        """The mask of what is not small enough to go; None where nothing goes."""
        return None


REGULARIZERS: Registry[type[Regularizer]] = Registry("regularizer", "qlib.regularize")
"""Class name in a schedule -> the regularizer."""


def regularizer_classes() -> dict[str, ClassFields]:
    """The arguments of each class of regularizer in a schedule."""
    return {name: class_fields(REGULARIZERS[name]) for name in REGULARIZERS}


def group_problem(kinds: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor]) -> str:
    """Why some weights do not have groups of these types; empty if they have.

    >>> import torch
    >>> group_problem({"w": ["Rows", "2D"]}, {"w": torch.ones(2, 3)})
    "'w' has the shape 2x3, and groups of type 2D need 3 axes"
    """
    pairs = ((name, kind) for name in weights for kind in kinds[name])
    found = ((name, Groups(kind).problem(weights[name])) for name, kind in pairs)
    return next((f"{name!r} {problem}" for name, problem in found if problem), "")
