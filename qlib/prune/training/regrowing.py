"""Pruning by what gradients say of weights: those that are dead come back where they would help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlib.config.schedule.keys import SHARE, key, one_of
from qlib.config.schedule.pruning_keys import LEVEL, NAMES, needed
from qlib.prune.magnitude import keep_largest, smallest_elements_mask
from qlib.prune.pruner import CURVES, PRUNERS, Alone, Moment, Target

__all__ = ["Movement", "RigL"]


@PRUNERS.register("RigLPruner")
@dataclass(frozen=True, kw_only=True)
class RigL(Alone):
    """The sparsity stays; each time a share of the live weights, the smallest, makes place for others.

    It is ``alpha / 2 * (1 + cos(pi t))`` for the share t of the policy's time. Those with the largest gradients come
    back, at 0. The first time the smallest weights go. It acts within epochs with `mini_batch_pruning_frequency`.

    References: Evci et al., "Rigging the lottery", 2020, section 3.

    >>> weight, kept = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    >>> target = Target("w", weight, kept, memory=torch.tensor([0.0, 0.1, 0.2, 0.9]))
    >>> RigL(weights=("w",), sparsity=0.5, alpha=1.0).mask(target, Moment(1, 0, 3))  # cos is 0: one of two
    tensor([ True, False, False,  True])
    """

    watches_gradients: ClassVar[bool] = True

    weights: tuple[str, ...] = needed(NAMES)
    sparsity: float = needed(LEVEL)
    alpha: float = key(0.3, SHARE)

    def after_backward(self, weight: Tensor, gradient: Tensor, memory: Tensor | None) -> Tensor:
        return gradient.abs()

    def mask(self, target: Target, moment: Moment) -> Tensor | None:
        magnitude, kept = target.weight.abs(), target.kept
        if bool(kept.all()):
            return smallest_elements_mask(target.weight, self.sparsity)
        if target.memory is None:
            return None
        moved = int(self.alpha / 2 * (1 + math.cos(math.pi * moment.share)) * int(kept.sum()))
        staying = kept & keep_largest(magnitude.masked_fill(~kept, torch.inf), moved)
        returning = keep_largest(target.memory.masked_fill(staying, -1.0), kept.numel() - moved)
        return staying | returning


@PRUNERS.register("MovementPruner")
@dataclass(frozen=True, kw_only=True)
class Movement(Alone):
    """Weights go that training moves towards zero: those of the smallest ``-sum over steps of w * gradient``.

    With `use_double_copies` the weights behind the mask move on, and may come back. For models that were trained on
    other data.

    References: Sanh et al., "Movement pruning", 2020, section 3.

    >>> pruner = Movement(initial_sparsity=0.5, final_sparsity=0.5, weights=("w",))
    >>> weight = torch.tensor([1.0, 1.0])
    >>> moved = pruner.after_backward(weight, torch.tensor([0.5, -0.5]), None)
    >>> moved, pruner.mask(Target("w", weight, weight > 0, memory=moved), Moment(0))
    (tensor([-0.5000,  0.5000]), tensor([False,  True]))
    """

    watches_gradients: ClassVar[bool] = True

    initial_sparsity: float = needed(LEVEL)
    final_sparsity: float = needed(LEVEL)
    weights: tuple[str, ...] = needed(NAMES)
    curve: str = key("cubic", one_of(*CURVES))

    def after_backward(self, weight: Tensor, gradient: Tensor, memory: Tensor | None) -> Tensor:
        moved = -weight * gradient
        return moved if memory is None else memory + moved

    def mask(self, target: Target, moment: Moment) -> Tensor | None:
        if target.memory is None:
            return None
        first, last = self.initial_sparsity, self.final_sparsity
        level = first + (last - first) * CURVES[self.curve](moment.share)
        return keep_largest(target.memory, int(level * target.weight.numel()))
