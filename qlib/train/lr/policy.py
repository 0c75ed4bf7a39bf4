"""Learning rates that change while a policy of the schedule is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from qlib.checkpoint.fields import Schema
from qlib.config.schedule.types import PolicySpec
from qlib.train.lr.schedulers import LrScheduler, counts_steps, make_lr_scheduler
from qlib.train.policy import Batch, Policy

__all__ = ["LrPolicy"]


class LrPolicy(Policy):
    """Steps a learning-rate scheduler while its policy is active."""

    _scheduler: LrScheduler

    def __init__(self, spec: PolicySpec, steps_per_epoch: int) -> None:
        self._spec, self._steps_per_epoch = spec, steps_per_epoch

    def use(self, optimizer: Optimizer, first: int) -> None:
        self._scheduler = make_lr_scheduler(self._spec.component, optimizer, steps_per_epoch=self._steps_per_epoch)

    def on_minibatch_end(self, batch: Batch) -> None:
        if counts_steps(self._spec) and self._spec.active(batch.epoch):
            self._scheduler.step(batch.epoch * self._steps_per_epoch + batch.step + 1)

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if not counts_steps(self._spec) and self._spec.active(epoch):
            self._scheduler.step(epoch + 1, metrics)

    @property
    def saved_fields(self) -> Schema:
        return self._scheduler.saved_fields

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scheduler.load_state_dict(state)
