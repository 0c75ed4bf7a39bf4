"""L1: weights go to zero one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlib.config.schedule.keys import FROM_0, key
from qlib.config.schedule.pruning_keys import by_name, exactly, needed
from qlib.prune.groups import CRITERIA
from qlib.regularize._base import REGULARIZERS, Regularizer

__all__ = ["L1"]


@REGULARIZERS.register("L1Regularizer")
@dataclass(frozen=True, kw_only=True)
class L1(Regularizer):
    """``strength * sum |w|``; with criteria, weights whose magnitude is not above the strength go after each step.

    On the weights of batch-norms it is network slimming (Liu et al., 2017).

    >>> import torch
    >>> weight = torch.tensor([0.1, -3.0])
    >>> regularizer = L1(reg_regims={"w": 0.5}, threshold_criteria="Max")
    >>> regularizer.loss("w", weight), regularizer.kept("w", weight)
    (tensor(1.5500), tensor([False,  True]))
    """

    reg_regims: Mapping[str, float] = needed(by_name(FROM_0))
    threshold_criteria: str | None = key(None, exactly(CRITERIA).or_null("or null"))

    def loss(self, name: str, weight: Tensor) -> Tensor:
        return self.reg_regims[name] * weight.abs().sum()

    def kept(self, name: str, weight: Tensor) -> Tensor | None:
        return None if self.threshold_criteria is None else weight.abs() > self.reg_regims[name]
