"""The types of a training schedule: its components, and the policies that say in which epochs each acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qlib.config.layers.settings import Rule

__all__ = ["Component", "PolicySpec", "Schedule"]


@dataclass(frozen=True)
class Component:
    """One component of a schedule, as a quantizer, a pruner or a learning-rate scheduler.

    `settings` holds the arguments that the file gives, checked; what it does not give is not there. `rules` are the
    overrides of a quantizer, in order of precedence.
    """

    section: str
    name: str
    cls: str
    settings: Mapping[str, object]
    rules: tuple[Rule, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class PolicySpec:
    """When a component acts: in the listed `epochs`, or from `start` to `end`, which is exclusive, every `frequency`.

    Laws: 0 <= start < end and 0 < frequency <= end - start; `active` is a pure function, and false outside
    [start, end); a policy of listed epochs has the first as its start and the last before its end.

    >>> component = Component("lr_schedulers", "lr", "StepLR", {"step_size": 2})
    >>> [epoch for epoch in range(20) if PolicySpec(component, 3, 10, 3).active(epoch)]
    [3, 6, 9]
    >>> [epoch for epoch in range(20) if PolicySpec(component, 2, 8, 1, (2, 7)).active(epoch)]
    [2, 7]
    """

    component: Component
    start: int
    end: int
    frequency: int = 1
    epochs: tuple[int, ...] | None = None
    args: Mapping[str, object] = field(default_factory=dict)
    where: str = ""

    @property
    def last(self) -> int:
        """The last epoch in which the policy acts.

        >>> component = Component("pruners", "p", "SensitivityPruner", {})
        >>> PolicySpec(component, 3, 10, 3).last, PolicySpec(component, 2, 8, 1, (2, 7)).last
        (9, 7)
        """
        return self.start + (self.end - 1 - self.start) // self.frequency * self.frequency

    def with_settings(self, settings: Mapping[str, object]) -> PolicySpec:
        """The policy of a component of the same class with other settings."""
        return replace(self, component=replace(self.component, settings=settings))

    def active(self, epoch: int) -> bool:
        """Whether the policy acts in an epoch."""
        if self.epochs is not None:
            return epoch in self.epochs
        return self.start <= epoch < self.end and (epoch - self.start) % self.frequency == 0


@dataclass(frozen=True)
class Schedule:
    """The policies of a file, in order of declaration, which is the order in which they act.

    `distillers`: Distiller could read the file, so that less of it is an error.
    """

    policies: tuple[PolicySpec, ...]
    distillers: bool = False

    def active(self, epoch: int) -> tuple[PolicySpec, ...]:
        """The policies that act in an epoch: a pure function."""
        return tuple(policy for policy in self.policies if policy.active(epoch))

    def of(self, section: str) -> tuple[PolicySpec, ...]:
        """The policies of the components of one section, such as `quantizers`."""
        return tuple(policy for policy in self.policies if policy.component.section == section)
