"""What a pruner of a schedule is: from weights, and when it is asked, to masks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlib.config.schedule.keys import ClassFields
from qlib.config.schedule.pruning_keys import NAMING, class_fields
from qlib.registry import Registry

__all__ = ["CURVES", "PRUNERS", "Alone", "Chosen", "Moment", "Pruner", "Target", "pruner_classes"]


@dataclass(frozen=True)
class Moment:
    """When a pruner is asked: in an epoch of its policy, which acts from `start` to `end`, exclusive.

    `random` is a seed that belongs to this moment alone.
    """

    epoch: int
    start: int = 0
    end: int = 1
    frequency: int = 1
    random: int = 0

    @property
    def share(self) -> float:
        """Which part of the policy's time has passed: 0 in its first epoch, 1 in its last.

        >>> [round(Moment(epoch, 2, 9, 2).share, 2) for epoch in (2, 4, 6, 8)]
        [0.0, 0.33, 0.67, 1.0]
        """
        span = (self.end - self.start - 1) // self.frequency * self.frequency
        return min((self.epoch - self.start) / span, 1.0) if span else 1.0

    def generator(self, index: int) -> torch.Generator:
        """Random numbers for the target of this index."""
        return torch.Generator().manual_seed((self.random + index) % 2**63)


CURVES: Mapping[str, Callable[[float], float]] = {
    "cubic": lambda share: 1 - (1 - share) ** 3,
    "linear": lambda share: share,
    "one_cycle": lambda share: (_one_cycle(share) - _one_cycle(0)) / (_one_cycle(1) - _one_cycle(0)),
}
"""Name -> how far a level has come from the first to the last, by the share of the time that has passed.

The cubic one is that of automated gradual pruning (Zhu & Gupta, 2018), the last one that of Hubens et al., 2021.
"""


def _one_cycle(share: float) -> float:
    return 1 / (1 + math.exp(5 - 14 * share))


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter to be pruned: its weight to rank by, and its mask as it is.

    `memory` is what the pruner remembers of it; `activations` are, for each channel behind the ReLU that follows, the
    share of zeros and the mean.
    """

    name: str
    weight: Tensor
    kept: Tensor
    index: int = 0
    memory: Tensor | None = None
    activations: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Chosen:
    """A mask, and what multiplies the weights that are kept."""

    mask: Tensor
    scale: float = 1.0


class Pruner(ABC):
    """A pruner: a frozen dataclass whose fields are the keys of its YAML component."""

    watches_gradients: ClassVar[bool] = False
    """Whether `after_backward` is to be asked at each step."""

    watches_activations: ClassVar[bool] = False
    """Whether its targets need activations."""

    @property
    def names(self) -> Sequence[str]:
        """The parameters that it prunes."""
        return tuple(next(getattr(self, key) for key in NAMING if hasattr(self, key)))

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        """Why it cannot prune these weights, after the name of one of them; empty if it can."""
        return ""

    def at_first(self, weight: Tensor) -> Tensor | None:
        """What it remembers of a weight from the first time that it prunes."""
        return None

    def after_backward(self, weight: Tensor, gradient: Tensor, memory: Tensor | None) -> Tensor | None:
        """What it remembers of a weight from a step."""
        return memory

    @abstractmethod
    def choose(self, targets: Sequence[Target], moment: Moment) -> dict[str, Chosen]:
        """The masks of targets; one that has none here keeps the mask that it has."""


class Alone(Pruner):
    """A pruner whose mask of a weight does not depend on others."""

    def choose(self, targets: Sequence[Target], moment: Moment) -> dict[str, Chosen]:
        masks = {target.name: self.mask(target, moment) for target in targets}
        return {name: Chosen(mask) for name, mask in masks.items() if mask is not None}

    @abstractmethod
    def mask(self, target: Target, moment: Moment) -> Tensor | None:
        """The mask of one weight; None: it keeps the one that it has."""


PRUNERS: Registry[type[Pruner]] = Registry("pruner", "qlib.prune.training")
"""Class name in a schedule -> the pruner."""


def pruner_classes() -> dict[str, ClassFields]:
    """The arguments of each class of pruner in a schedule."""
    return {name: class_fields(PRUNERS[name]) for name in PRUNERS}
