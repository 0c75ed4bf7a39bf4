"""Pruning to a level: the share of weights that are zero, fixed or growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlib.config.schedule.keys import key, one_of
from qlib.config.schedule.pruning_keys import LEVEL, NAMES, by_name, needed
from qlib.prune.magnitude import smallest_elements_mask
from qlib.prune.pruner import CURVES, PRUNERS, Alone, Moment, Target

__all__ = ["Gradual", "Level"]


def _mask(target: Target, level: float) -> Tensor:
    """The smallest weights go, and zeros that were pruned before do not come back."""
    return smallest_elements_mask(target.weight, level) & ((target.weight != 0) | target.kept)


@PRUNERS.register("SparsityLevelParameterPruner")
@dataclass(frozen=True, kw_only=True)
class Level(Alone):
    """Of each tensor the ``int(level * n)`` weights of least magnitude go.

    >>> import torch
    >>> weight = torch.tensor([0.1, -3.0, 2.0, -0.2])
    >>> Level(levels={"w": 0.5}).mask(Target("w", weight, torch.ones(4, dtype=torch.bool)), Moment(0))
    tensor([False,  True,  True, False])
    """

    levels: Mapping[str, float] = needed(by_name(LEVEL))

    def mask(self, target: Target, moment: Moment) -> Tensor:
        return _mask(target, self.levels[target.name])


@PRUNERS.register("AutomatedGradualPruner")
@dataclass(frozen=True, kw_only=True)
class Gradual(Alone):
    """``s = final + (initial - final) (1 - t)^3`` of each tensor go, for the share t of the policy's time.

    References: Zhu & Gupta, "To prune, or not to prune", 2018, equation 1.

    >>> import torch
    >>> pruner = Gradual(initial_sparsity=0.2, final_sparsity=0.8, weights=("w",))
    >>> target = Target("w", torch.arange(1.0, 11), torch.ones(10, dtype=torch.bool))
    >>> [int((~pruner.mask(target, Moment(epoch, 0, 5))).sum()) for epoch in range(5)]
    [2, 5, 7, 7, 8]
    """

    initial_sparsity: float = needed(LEVEL)
    final_sparsity: float = needed(LEVEL)
    weights: tuple[str, ...] = needed(NAMES)
    curve: str = key("cubic", one_of(*CURVES))

    def mask(self, target: Target, moment: Moment) -> Tensor:
        first, last = self.initial_sparsity, self.final_sparsity
        return _mask(target, first + (last - first) * CURVES[self.curve](moment.share))
