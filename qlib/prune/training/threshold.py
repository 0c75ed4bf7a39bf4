"""Pruning by a threshold: weights below a magnitude go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.config.schedule.keys import FROM_0, count, key
from qlib.config.schedule.pruning_keys import NAMES, by_name, exactly, needed, regimes
from qlib.prune.groups import CRITERIA, GROUP_TYPES, Groups
from qlib.prune.pruner import PRUNERS, Alone, Moment, Target

__all__ = ["Baidu", "Magnitude", "Sensitivity", "Splicing", "Structure"]


@PRUNERS.register("MagnitudeParameterPruner")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Alone):
    """Weights whose magnitude is not above a threshold go.

    >>> target = Target("w", torch.tensor([0.1, -3.0, 2.0]), torch.ones(3, dtype=torch.bool))
    >>> Magnitude(thresholds={"w": 2.0}).mask(target, Moment(0))
    tensor([False,  True, False])
    """

    thresholds: Mapping[str, float] = needed(by_name(FROM_0))

    def mask(self, target: Target, moment: Moment) -> Tensor:
        return target.weight.abs() > self.thresholds[target.name]


@PRUNERS.register("SensitivityPruner")
@dataclass(frozen=True, kw_only=True)
class Sensitivity(Alone):
    """Weights whose magnitude is not above ``s * std(w)`` go, with the deviation of when it pruned first.

    References: Han et al., "Learning both weights and connections", 2015, section 3.

    >>> weight = torch.tensor([1.0, -1.0, 3.0, -3.0])
    >>> pruner = Sensitivity(sensitivities={"w": 0.5})
    >>> target = Target("w", weight, weight != 0, memory=pruner.at_first(weight))
    >>> pruner.mask(target, Moment(0))  # 0.5 * 2.58
    tensor([False, False,  True,  True])
    """

    sensitivities: Mapping[str, float] = needed(by_name(FROM_0))

    def at_first(self, weight: Tensor) -> Tensor:
        return weight.std()

    def mask(self, target: Target, moment: Moment) -> Tensor:
        assert target.memory is not None
        return target.weight.abs() > self.sensitivities[target.name] * target.memory


@PRUNERS.register("SplicingPruner")
@dataclass(frozen=True, kw_only=True)
class Splicing(Alone):
    """Weights below ``low * t`` go, those from ``high * t`` on come back, between both nothing changes.

    ``t = mean|w| + s * std|w|``, of when it pruned first; s grows by ``1 + epochs * sensitivity_multiplier``. Weights
    come back where they train on behind their masks: `mask_on_forward_only` or `use_double_copies`.

    References: Guo et al., "Dynamic network surgery", 2016, section 3.3.

    >>> weight = torch.tensor([0.5, 1.0, 1.0, 1.5])
    >>> pruner = Splicing(sensitivities={"w": 0.0}, low_thresh_mult=0.9, hi_thresh_mult=1.1)
    >>> kept = torch.tensor([True, True, False, False])
    >>> pruner.mask(Target("w", weight, kept, memory=pruner.at_first(weight)), Moment(0))
    tensor([False,  True, False,  True])
    """

    sensitivities: Mapping[str, float] = needed(by_name(FROM_0))
    low_thresh_mult: float = needed(FROM_0)
    hi_thresh_mult: float = needed(FROM_0)
    sensitivity_multiplier: float = key(0.0, FROM_0)

    def at_first(self, weight: Tensor) -> Tensor:
        return torch.stack([weight.abs().mean(), weight.abs().std()])

    def mask(self, target: Target, moment: Moment) -> Tensor:
        assert target.memory is not None
        mean, deviation = target.memory
        grown = 1 + (moment.epoch - moment.start) * self.sensitivity_multiplier
        threshold = mean + deviation * self.sensitivities[target.name] * grown
        magnitude = target.weight.abs()
        large: Tensor = magnitude >= self.hi_thresh_mult * threshold
        return torch.logical_or(large, target.kept & (magnitude >= self.low_thresh_mult * threshold))


@PRUNERS.register("BaiduRNNPruner")
@dataclass(frozen=True, kw_only=True)
class Baidu(Alone):
    """Weights whose magnitude is not above a threshold go, which grows in a line, and after a ramp in a steeper one.

    References: Narang et al., "Exploring sparsity in recurrent neural networks", 2017, section 3.

    >>> pruner = Baidu(q=0.9, ramp_epoch_offset=2, ramp_slope_mult=2.0, weights=("w",))
    >>> [round(pruner.threshold(Moment(epoch, 0, 4)), 3) for epoch in range(4)]
    [0.18, 0.36, 0.9, 1.26]
    """

    q: float = needed(FROM_0)
    ramp_epoch_offset: int = needed(count(0))
    ramp_slope_mult: float = needed(FROM_0)
    weights: tuple[str, ...] = needed(NAMES)

    def threshold(self, moment: Moment) -> float:
        """The magnitude up to which weights go."""
        ramp = moment.start + self.ramp_epoch_offset
        epochs = 2 * self.ramp_epoch_offset + 3 * (moment.end - ramp)
        slope = 2 * self.q * moment.frequency / max(epochs, 1)
        if moment.epoch < ramp:
            return slope * (moment.epoch - moment.start + 1) / moment.frequency
        steep = self.ramp_slope_mult * (moment.epoch - ramp + 1)
        return slope * (self.ramp_epoch_offset + 1 + steep) / moment.frequency

    def mask(self, target: Target, moment: Moment) -> Tensor:
        return target.weight.abs() > self.threshold(moment)


@PRUNERS.register("StructureParameterPruner")
@dataclass(frozen=True, kw_only=True)
class Structure(Alone):
    """Groups whose largest, or mean, magnitude is not above a threshold go.

    >>> target = Target("w", torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool))
    >>> Structure(reg_regims={"w": (0.5, "Filters")}, threshold_criteria="Mean_Abs").mask(target, Moment(0))
    tensor([[False, False],
            [ True,  True]])
    """

    reg_regims: Mapping[str, tuple[float, str]] = needed(regimes(GROUP_TYPES, FROM_0))
    threshold_criteria: str = needed(exactly(CRITERIA))

    def problem(self, weights: Mapping[str, Tensor]) -> str:
        found = ((name, Groups(self.reg_regims[name][1]).problem(weight)) for name, weight in weights.items())
        return next((f"{name!r} {problem}" for name, problem in found if problem), "")

    def mask(self, target: Target, moment: Moment) -> Tensor:
        threshold, kind = self.reg_regims[target.name]
        groups = Groups(kind)
        kept = groups.strength(target.weight, self.threshold_criteria) > threshold
        return groups.spread(kept, target.weight)
