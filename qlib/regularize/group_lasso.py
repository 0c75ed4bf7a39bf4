"""Group lasso: whole groups of weights go to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from qlib.config.schedule.keys import FROM_0, key
from qlib.config.schedule.pruning_keys import exactly, needed, regimes
from qlib.prune.groups import CRITERIA, GROUP_TYPES, Groups
from qlib.regularize._base import REGULARIZERS, Regularizer, group_problem

__all__ = ["GroupLasso", "GroupVariance"]

_SUMS = ("Rows+Cols", "Channels+4D")
_KINDS = (*(kind for kind in GROUP_TYPES if kind != "Blocks"), *_SUMS)


@REGULARIZERS.register("GroupLassoRegularizer")
@dataclass(frozen=True, kw_only=True)
class GroupLasso(Regularizer):
    """``strength * sum of the L2 norms of the groups`` (Wen et al., "Learning structured sparsity", 2016).

    With criteria, groups whose largest or mean magnitude is not above the strength go after each step.

    >>> import torch
    >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> GroupLasso(reg_regims={"w": (0.5, "Rows")}).loss("w", weight)  # 0.5 * (5 + 1)
    tensor(3.)
    """

    reg_regims: Mapping[str, tuple[float, str]] = needed(regimes(_KINDS, FROM_0))
    threshold_criteria: str | None = key(None, exactly(CRITERIA).or_null("or null"))

    def _groups(self, name: str) -> Sequence[Groups]:
        return [Groups(kind) for kind in self.reg_regims[name][1].split("+")]

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        return group_problem({name: [each.kind for each in self._groups(name)] for name in weights}, weights)

    def loss(self, name: str, weight: Tensor) -> Tensor:
        norms = (each.norms(weight, 2).sum() for each in self._groups(name))
        return self.reg_regims[name][0] * reduce(Tensor.add, norms)

    def kept(self, name: str, weight: Tensor) -> Tensor | None:
        if self.threshold_criteria is None:
            return None
        strength, criterion = self.reg_regims[name][0], self.threshold_criteria
        masks = (each.spread(each.strength(weight, criterion) > strength, weight) for each in self._groups(name))
        return reduce(Tensor.logical_and, masks)


@REGULARIZERS.register("GroupVarianceRegularizer")
@dataclass(frozen=True, kw_only=True)
class GroupVariance(Regularizer):
    """``strength / var(L2 norms of the channels)``: channels become unequal, so that some can go.

    >>> import torch
    >>> weight = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    >>> GroupVariance(reg_regims={"w": (2.0, "Channels")}).loss("w", weight)  # 2 / var(5, 1)
    tensor(0.2500)
    """

    reg_regims: Mapping[str, tuple[float, str]] = needed(regimes(["Channels"], FROM_0))

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        lone = next((name for name, weight in weights.items() if weight.ndim > 1 and weight.shape[1] < 2), None)
        if lone is not None:
            return f"{lone!r} has one channel, which has no variance"
        return group_problem({name: ["Channels"] for name in weights}, weights)

    def loss(self, name: str, weight: Tensor) -> Tensor:
        return self.reg_regims[name][0] / (Groups("Channels").norms(weight, 2).var() + 1e-8)
