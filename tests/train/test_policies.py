"""Sections of a schedule: each adds its policies to a run by one registration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import good
from torch import nn

from qlib.app.policies import SECTIONS, Section, Setup
from qlib.config.flags.groups import TrainArgs
from qlib.config.schedule.components import KIND_OF
from qlib.config.schedule.keys import ClassFields
from qlib.train.loop import Trainee
from qlib.train.optimizers import ParameterGroup
from qlib.train.policy import Batch, Policy


def test_each_section_that_a_schedule_may_have_adds_policies() -> None:
    assert set(SECTIONS) == set(KIND_OF)


class _Counting(Policy):
    def __init__(self) -> None:
        self.steps = 0

    def on_minibatch_end(self, batch: Batch) -> None:
        self.steps += 1


def test_a_new_section_is_one_registration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy, seen = _Counting(), list[Setup]()

    def add(setup: Setup) -> Setup:
        seen.append(setup)
        return setup.plus(policy, None)

    monkeypatch.setattr(SECTIONS, "_items", {**SECTIONS._items, "pruners": Section({"Counting": ClassFields({})}, add)})
    (tmp_path / "schedule.yaml").write_text(
        "pruners: {one: {class: Counting}}\n"
        "policies: [{pruner: {instance_name: one}, starting_epoch: 0, ending_epoch: 1, frequency: 1}]\n"
    )
    good("-a digits_cnn --compress schedule.yaml --epochs 1 -b 64 --etes 0.1", tmp_path)
    (setup,) = seen
    assert [spec.component.cls for spec in setup.schedule.of("pruners")] == ["Counting"]
    assert policy.steps == -(-len(setup.images.epoch(0).indices) // 64)


class _Learning(Policy):
    """One with parameters of its own."""

    def __init__(self, lr_factor: float) -> None:
        self._lr_factor = lr_factor

    @property
    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(self._lr_factor)]

    def use(self, optimizer: torch.optim.Optimizer, first: int) -> None:
        self.group = optimizer.param_groups[first]


def test_each_policy_is_told_of_its_own_groups() -> None:
    model, policies = nn.Linear(2, 2), [_Learning(0.5), Policy(), _Learning(0.25)]
    trainee = Trainee.of(TrainArgs(lr=1.0), model, list(model.parameters()), policies)
    assert trainee.lr == 1.0
    assert [policy.group["lr"] for policy in policies if isinstance(policy, _Learning)] == [0.5, 0.25]
