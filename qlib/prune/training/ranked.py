"""Pruning of ranked groups: the filters, channels or blocks of a tensor that score lowest go."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlib.config.schedule.keys import FROM_0, count, key, one_of
from qlib.config.schedule.pruning_keys import BLOCK, LEVEL, NAMES, RANGE, exactly, needed
from qlib.prune.groups import GROUP_TYPES, Groups
from qlib.prune.magnitude import keep_largest
from qlib.prune.pruner import CURVES, PRUNERS, Chosen, Moment, Pruner, Target

__all__ = ["Ranked"]

_OF_FILTERS = ("Filters", "3D")


@dataclass(frozen=True, kw_only=True)
class Ranked(Pruner):
    """Of each tensor ``floor(level * n)`` of the n groups go, those that score lowest, in steps of `group_size`.

    All but one step of groups may go. With `group_dependency: Leader` the mask of the first tensor is that of all.
    `noise` adds a normal random number, of this deviation relative to that of the scores, before they are ranked.
    """

    filters_only: ClassVar[bool] = False

    weights: tuple[str, ...] = needed(NAMES)
    group_type: str = key("Filters", exactly(GROUP_TYPES))
    group_dependency: str | None = key(None, exactly(["Leader"]).or_null("or null"))
    kwargs: tuple[int, int] = key((1, 1), BLOCK)
    group_size: int = key(1, count(1))
    rounding_fn: str = key("floor", one_of("floor"))
    noise: float = key(0.0, FROM_0)

    @property
    def groups(self) -> Groups:
        """What is ranked."""
        return Groups(self.group_type, self.kwargs)

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        if self.filters_only and self.groups.kind not in _OF_FILTERS:
            return f"group_type is {self.group_type}; allowed: {', '.join(_OF_FILTERS)}, which this class ranks"
        found = ((name, self.groups.problem(weight)) for name, weight in weights.items())
        bad = next((f"{name!r} {problem}" for name, problem in found if problem), "")
        if bad or self.group_dependency is None or not weights:
            return bad
        shapes = {name: self.groups.norms(weight.detach(), 1).shape for name, weight in weights.items()}
        (leader, first), *others = shapes.items()
        other = next((name for name, shape in others if shape.numel() != first.numel()), None)
        if other is None:
            return ""
        counts = f"{leader!r} has {first.numel()} groups and {other!r} {shapes[other].numel()}"
        return f"group_dependency Leader needs tensors with as many groups: {counts}"

    @abstractmethod
    def level(self, moment: Moment) -> float:
        """The share of groups that go."""

    @abstractmethod
    def scores(self, target: Target, moment: Moment) -> Tensor | None:
        """The score of each group, as `Groups.norms` shapes it; None: nothing is known yet."""

    def choose(self, targets: Sequence[Target], moment: Moment) -> dict[str, Chosen]:
        leading = {target.name: self.kept(target, moment) for target in self._ranked(targets)}
        if self.group_dependency is None:
            kept = leading
        else:
            kept = dict.fromkeys((target.name for target in targets), leading[targets[0].name])
        return {target.name: self.chosen(target, each) for target in targets if (each := kept[target.name]) is not None}

    def _ranked(self, targets: Sequence[Target]) -> Sequence[Target]:
        return targets if self.group_dependency is None else targets[:1]

    def chosen(self, target: Target, kept: Tensor) -> Chosen:
        """The mask of a weight whose groups are kept as those of the leader, along the same axes."""
        own = self.groups.norms(target.weight, 1)
        return Chosen(self.groups.spread(kept.reshape(own.shape), target.weight))

    def kept(self, target: Target, moment: Moment) -> Tensor | None:
        """Which groups of a weight are kept; None while nothing is known of them."""
        scores = self.scores(target, moment)
        if scores is None:
            return None
        if self.noise:
            drawn = torch.randn(scores.shape, generator=moment.generator(target.index)).to(scores.device)
            scores = scores + self.noise * scores.std() * drawn
        kept = keep_largest(scores, self.removed(scores.numel(), self.level(moment)))
        return kept & ~self._dead(target)

    def _dead(self, target: Target) -> Tensor:
        """The groups that were pruned before and are zero: they do not come back."""
        live = target.weight.abs().float() + target.kept
        return torch.eq(self.groups.norms(live, 1), 0)

    def removed(self, groups: int, level: float) -> int:
        """How many groups go.

        >>> pruner = L1(desired_sparsity=0.6, weights=("w",), group_size=4)
        >>> pruner.removed(16, 0.6), pruner.removed(16, 0.99), pruner.removed(3, 0.9)
        (8, 12, 0)
        """
        step = self.group_size
        wanted = int(level * groups) // step * step
        return max(min(wanted, (groups - 1) // step * step), 0)


@dataclass(frozen=True, kw_only=True)
class _Fixed(Ranked):
    desired_sparsity: float = needed(LEVEL)

    def level(self, moment: Moment) -> float:
        return self.desired_sparsity


@dataclass(frozen=True, kw_only=True)
class _Gradual(Ranked):
    """The level grows as that of AutomatedGradualPruner."""

    initial_sparsity: float = needed(LEVEL)
    final_sparsity: float = needed(LEVEL)
    curve: str = key("cubic", one_of(*CURVES))

    def level(self, moment: Moment) -> float:
        first, last = self.initial_sparsity, self.final_sparsity
        return first + (last - first) * CURVES[self.curve](moment.share)


class _L1(Ranked):
    """By their mean magnitude."""

    def scores(self, target: Target, moment: Moment) -> Tensor:
        return self.groups.norms(target.weight, 1) / self.groups.size(target.weight)


class _L2(Ranked):
    """By their root mean square."""

    def scores(self, target: Target, moment: Moment) -> Tensor:
        return self.groups.norms(target.weight, 2) / math.sqrt(self.groups.size(target.weight))


class _Apoz(Ranked):
    """By the average percentage of zeros behind their ReLU: filters with most zeros go (Hu et al., 2016)."""

    filters_only: ClassVar[bool] = True
    watches_activations: ClassVar[bool] = True

    def scores(self, target: Target, moment: Moment) -> Tensor:
        assert target.activations is not None
        return -_by_filter(target.activations[0], target.weight)


class _Mean(Ranked):
    """By the mean behind their ReLU: filters with the smallest go."""

    filters_only: ClassVar[bool] = True
    watches_activations: ClassVar[bool] = True

    def scores(self, target: Target, moment: Moment) -> Tensor:
        assert target.activations is not None
        return _by_filter(target.activations[1], target.weight)


class _Gradient(Ranked):
    """By ``sum w * gradient`` of the last step: filters with the smallest go; none before the first step."""

    filters_only: ClassVar[bool] = True
    watches_gradients: ClassVar[bool] = True

    def after_backward(self, weight: Tensor, gradient: Tensor, memory: Tensor | None) -> Tensor:
        return self.groups.sums(weight * gradient).flatten()

    def scores(self, target: Target, moment: Moment) -> Tensor | None:
        return None if target.memory is None else _by_filter(target.memory, target.weight)


class _Random(Ranked):
    """At random, anew each time."""

    def scores(self, target: Target, moment: Moment) -> Tensor:
        shape = self.groups.norms(target.weight, 1).shape
        return torch.rand(shape, generator=moment.generator(target.index)).to(target.weight.device)


class _Bernoulli(_Random):
    """Each goes with the probability `level`, anew each time; those that are kept are scaled by 1 / their share.

    The scale is one of the forward pass: it acts with `use_double_copies`.
    """

    def kept(self, target: Target, moment: Moment) -> Tensor:
        drawn = self.scores(target, moment)
        kept = drawn >= self.level(moment)
        return kept if bool(kept.any()) else drawn == drawn.max()

    def chosen(self, target: Target, kept: Tensor) -> Chosen:
        return Chosen(super().chosen(target, kept).mask, kept.numel() / int(kept.sum()))


def _by_filter(values: Tensor, weight: Tensor) -> Tensor:
    """A value of each filter, as `Groups.norms` shapes them."""
    return values.to(weight.device).view(-1, *[1] * (weight.ndim - 1))


@PRUNERS.register("L1RankedStructureParameterPruner")
@dataclass(frozen=True, kw_only=True)
class L1(_Fixed, _L1):
    """Groups of the smallest mean magnitude go (Li et al., "Pruning filters for efficient convnets", 2017).

    >>> weight = torch.tensor([[1.0, -1.0], [3.0, 0.0], [0.1, 0.1]])
    >>> target = Target("w", weight, torch.ones(3, 2, dtype=torch.bool))
    >>> L1(desired_sparsity=0.5, weights=("w",)).choose([target], Moment(0))["w"].mask[:, 0]
    tensor([ True,  True, False])
    """


@PRUNERS.register("L1RankedStructureParameterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class L1Agp(_Gradual, _L1):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("L2RankedStructureParameterPruner")
@dataclass(frozen=True, kw_only=True)
class L2(_Fixed, _L2):
    """Groups of the smallest root mean square go.

    >>> weight = torch.tensor([[2.0, 2.0], [3.0, 0.0]])
    >>> target = Target("w", weight, torch.ones(2, 2, dtype=torch.bool))
    >>> L2(desired_sparsity=0.5, weights=("w",)).choose([target], Moment(0))["w"].mask[:, 0]  # 2 and 2.12
    tensor([False,  True])
    """


@PRUNERS.register("L2RankedStructureParameterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class L2Agp(_Gradual, _L2):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("RandomLevelStructureParameterPruner")
@dataclass(frozen=True, kw_only=True)
class RandomLevel(_L1):
    """Groups of the smallest mean magnitude go, to a level that is drawn from a range each time."""

    sparsity_range: tuple[float, float] = needed(RANGE)

    def level(self, moment: Moment) -> float:
        low, high = self.sparsity_range
        return low + (high - low) * float(torch.rand((), generator=moment.generator(0)))


@PRUNERS.register("ActivationAPoZRankedFilterPruner")
@dataclass(frozen=True, kw_only=True)
class Apoz(_Fixed, _Apoz):
    """Filters with the most zeros behind their ReLU go (Hu et al., "Network trimming", 2016)."""


@PRUNERS.register("ActivationAPoZRankedFilterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class ApozAgp(_Gradual, _Apoz):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("ActivationMeanRankedFilterPruner")
@dataclass(frozen=True, kw_only=True)
class Mean(_Fixed, _Mean):
    """Filters with the smallest mean behind their ReLU go."""


@PRUNERS.register("ActivationMeanRankedFilterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class MeanAgp(_Gradual, _Mean):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("GradientRankedFilterPruner")
@dataclass(frozen=True, kw_only=True)
class Gradient(_Fixed, _Gradient):
    """Filters with the smallest ``sum w * gradient`` go (after Molchanov et al., 2017)."""


@PRUNERS.register("GradientRankedFilterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class GradientAgp(_Gradual, _Gradient):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("RandomRankedFilterPruner")
@dataclass(frozen=True, kw_only=True)
class Random(_Fixed, _Random):
    """Filters go at random: what others are to be compared with."""


@PRUNERS.register("RandomRankedFilterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class RandomAgp(_Gradual, _Random):
    """The same, more of them from epoch to epoch."""


@PRUNERS.register("BernoulliFilterPruner")
@dataclass(frozen=True, kw_only=True)
class Bernoulli(_Fixed, _Bernoulli):
    """Each filter goes with a probability, anew each time: dropout of filters."""


@PRUNERS.register("BernoulliFilterPruner_AGP")
@dataclass(frozen=True, kw_only=True)
class BernoulliAgp(_Gradual, _Bernoulli):
    """The same, more of them from epoch to epoch."""
