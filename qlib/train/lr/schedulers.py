"""Learning-rate schedulers: what a component of a schedule does to the rates of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qlib.checkpoint.fields import NUMBER, Record
from qlib.config.schedule.keys import FROM_0, ClassFields, count, number, one_of, table
from qlib.config.schedule.types import Component, PolicySpec
from qlib.errors import ConfigError
from qlib.train.lr.formulas import ARGUMENTS, FORMULAS, MOMENTA
from qlib.values import Interval, Value, whole

_EPOCHS = whole(-1, 10**12)  # or steps
_RESULT = Value(lambda raw: NUMBER.read(raw) if raw not in (math.inf, -math.inf) else raw, NUMBER.allowed)

__all__ = ["LR_CLASSES", "FormulaLR", "LrScheduler", "PlateauLR", "counts_steps", "make_lr_scheduler"]


class LrScheduler(Protocol):
    """Sets the rates of an optimizer at the end of an epoch.

    Law: `step(n, metrics)` at the end of epoch n - 1, and only while its policy is active there. Its state, with that
    of the optimizer, is all there is: a new scheduler that loads it goes on in the same way, to the bit.
    """

    def step(self, epoch: int, metrics: Mapping[str, float] | None = None) -> None:
        """Sets the rates for `epoch`, the one to come; `metrics` are the `loss` and `top1` of the one that ended."""

    saved_fields: ClassVar[Record]
    """What the state holds."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state."""


class FormulaLR:
    """A scheduler whose rate is a pure function of the number of epochs, counted from the start of the run.

    Law: after `step(n)` the first group has the rate ``formula(base, n)``, whatever was stepped to before, and every
    other group has the same multiple of it as at the start. A policy that begins in epoch 35 therefore continues where
    one from epoch 0 would be, and one that ended leaves its last rate. The base of a group is its `initial_lr`, which
    is the rate it has when the scheduler first sees it.

    A new run (`last_epoch` -1) begins with the rate for epoch 0 where that is not the base: a warm-up beside a
    scheduler that begins at the base holds. A resumed one keeps the optimizer's rates.

    >>> import torch
    >>> weights, clip = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    >>> sgd = torch.optim.SGD([{"params": [weights], "lr": 0.8}, {"params": [clip], "lr": 0.1}])
    >>> scheduler = FormulaLR(sgd, Component("lr_schedulers", "lr", "StepLR", {"step_size": 45, "gamma": 0.5}), -1)
    >>> scheduler.step(90)
    >>> [group["lr"] for group in sgd.param_groups]
    [0.2, 0.025]
    """

    saved_fields: ClassVar[Record] = Record({"last_epoch": _EPOCHS})

    def __init__(self, optimizer: Optimizer, component: Component, last_epoch: int) -> None:
        settings = dict(component.settings)
        moves = bool(settings.pop("cycle_momentum", True))
        self._optimizer = optimizer
        self._formula, self._momentum = FORMULAS[component.cls], MOMENTA.get(component.cls) if moves else None
        self._moments = settings
        self._settings = {key: value for key, value in settings.items() if key not in ("base_momentum", "max_momentum")}
        self._last = last_epoch
        if self._momentum and not all({"momentum", "betas"} & set(group) for group in optimizer.param_groups):
            kind = type(optimizer).__name__
            raise ConfigError(
                f"{component.where}: {component.cls} moves the momentum, and {kind} has none; add cycle_momentum: false"
            )
        base = self._base()
        if last_epoch < 0 and (self._momentum or self._formula(base, 0, **self._settings) != base):
            self.step(0)

    def _base(self) -> float:
        """The base rate of the first group."""
        return float(self._optimizer.param_groups[0].setdefault("initial_lr", self._optimizer.param_groups[0]["lr"]))

    def step(self, epoch: int, metrics: Mapping[str, float] | None = None) -> None:
        """Sets the rates for `epoch`."""
        base = self._base()
        rate = self._formula(base, epoch, **self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * (group.setdefault("initial_lr", group["lr"]) / base) if base else rate
            if self._momentum:
                momentum = self._momentum(epoch, **self._moments)
                group.update({"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum})
        self._last = epoch

    def state_dict(self) -> dict[str, Any]:
        """The epoch that was stepped to; the rates are in the optimizer's own state."""
        return {"last_epoch": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state; the rates come with the optimizer's."""
        self._last = state["last_epoch"]


class PlateauLR:
    """torch's ReduceLROnPlateau: lower rates once an epoch's result has not improved for a while.

    The result is the loss, or Top1 with ``mode: max``; without a validation set, those of training.
    """

    saved_fields: ClassVar[Record] = Record(
        {"best": _RESULT, "num_bad_epochs": _EPOCHS, "cooldown_counter": _EPOCHS, "last_epoch": _EPOCHS}
    )

    def __init__(self, optimizer: Optimizer, component: Component, last_epoch: int) -> None:
        settings: dict[str, Any] = dict(component.settings)
        self._metric = "top1" if settings.get("mode") == "max" else "loss"
        self._scheduler = ReduceLROnPlateau(optimizer, **settings)

    def step(self, epoch: int, metrics: Mapping[str, float] | None = None) -> None:
        """Looks at the results of the epoch that ended."""
        assert metrics is not None, "ReduceLROnPlateau needs the results of the epoch"
        self._scheduler.step(metrics[self._metric])

    def state_dict(self) -> dict[str, Any]:
        """The best result so far, and how long ago it was."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what changes; the settings are those of the schedule."""
        self._scheduler.load_state_dict({key: state[key] for key in self.saved_fields.fields})


LR_CLASSES: Mapping[str, ClassFields] = {
    **ARGUMENTS,
    "ReduceLROnPlateau": ClassFields(
        table(
            mode=one_of("min", "max"),
            factor=number(Interval(0, 1, open_low=True, open_high=True)),
            patience=count(0),
            threshold=FROM_0,
            threshold_mode=one_of("rel", "abs"),
            cooldown=count(0),
            min_lr=FROM_0,
            eps=FROM_0,
        )
    ),
}
"""Class of learning-rate scheduler -> its arguments: those of torch that plain values can say, and our own two."""


def counts_steps(policy: PolicySpec) -> bool:
    """Whether a policy of a scheduler is stepped after each optimizer step, with the number of those in the run."""
    return policy.args.get("per") == "step"


def make_lr_scheduler(
    component: Component, optimizer: Optimizer, last_epoch: int = -1, *, steps_per_epoch: int = 1
) -> LrScheduler:
    """The scheduler of a component, made once all parameter groups are in the optimizer.

    `last_epoch` is the epoch that a resumed run had ended, -1 in a new run. `steps_per_epoch` is for one that is
    stepped after each optimizer step (`counts_steps`) and says in epochs how long it is.
    """
    if "epochs" in component.settings and "steps_per_epoch" not in component.settings:
        settings = {**component.settings, "steps_per_epoch": steps_per_epoch}
        component = Component(component.section, component.name, component.cls, settings, (), component.where)
    made: LrScheduler = (PlateauLR if component.cls == "ReduceLROnPlateau" else FormulaLR)(
        optimizer, component, last_epoch
    )
    return made
