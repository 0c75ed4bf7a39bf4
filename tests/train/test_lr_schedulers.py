"""Learning rates: each formula is torch's at every epoch, from any start, and resumed to the bit."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from qlib.app.policies import read_schedule
from qlib.config.schedule.keys import LR_REFUSED
from qlib.config.schedule.types import Component, PolicySpec, Schedule
from qlib.errors import ConfigError, QlibError
from qlib.train.lr.formulas import FORMULAS, MOMENTA
from qlib.train.lr.schedulers import LR_CLASSES, LrScheduler, counts_steps, make_lr_scheduler

PUBLISHED = Path(__file__).resolve().parents[1] / "schedules"
BASE = 0.4


def sgd(*rates: float, momentum: float = 0.9) -> SGD:
    rates = rates or (BASE,)
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], momentum=momentum)


def component(cls: str, **settings: Any) -> Component:
    return Component("lr_schedulers", "lr", cls, settings, where="a.yaml:2")


def rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def run(schedule: Schedule, optimizer: Optimizer, epochs: int) -> list[float]:
    """The rate in each epoch of a run."""
    made = {each.component.name: make_lr_scheduler(each.component, optimizer) for each in schedule.policies}
    rates = []
    for epoch in range(epochs):
        rates.append(rate(optimizer))
        optimizer.step()
        for each in schedule.active(epoch):
            made[each.component.name].step(epoch + 1, {"loss": 1.0, "top1": 50.0})
    return rates


CASES = [
    pytest.param("StepLR", {"step_size": 4, "gamma": 0.3}, id="StepLR"),
    pytest.param("MultiStepLR", {"milestones": (3, 9)}, id="MultiStepLR"),
    pytest.param("ConstantLR", {}, id="ConstantLR"),
    pytest.param("LinearLR", {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 6}, id="LinearLR"),
    pytest.param("ExponentialLR", {"gamma": 0.9}, id="ExponentialLR"),
    pytest.param("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01}, id="CosineAnnealingLR, twice there and back"),
    pytest.param("CosineAnnealingWarmRestarts", {"T_0": 5}, id="restarts"),
    pytest.param("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 3, "eta_min": 0.1}, id="restarts that lengthen"),
    pytest.param("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4}, id="triangular"),
    pytest.param(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2, "step_size_down": 3, "mode": "triangular2"},
        id="triangular2",
    ),
    pytest.param(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3, "mode": "exp_range", "gamma": 0.9, "max_momentum": 0.8,
         "base_momentum": 0.2},
        id="exp_range",
    ),
    pytest.param("OneCycleLR", {"max_lr": 1.0, "total_steps": 30}, id="one cycle"),
    pytest.param("OneCycleLR", {"max_lr": 1.0, "epochs": 10, "steps_per_epoch": 3}, id="one cycle of epochs"),
    pytest.param(
        "OneCycleLR",
        {"max_lr": 1.0, "total_steps": 30, "three_phase": True, "anneal_strategy": "linear", "base_momentum": 0.1},
        id="one cycle in three phases",
    ),
    pytest.param("OneCycleLR", {"max_lr": 1.0, "total_steps": 30, "cycle_momentum": False}, id="momentum left alone"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_each_formula_is_that_of_torch(cls: str, settings: dict[str, Any]) -> None:
    theirs, ours = sgd(), sgd()
    reference = getattr(lr_scheduler, cls)(theirs, **settings)
    scheduler = make_lr_scheduler(component(cls, **settings), ours)
    for epoch in range(30):
        for key in ("lr", "momentum"):
            assert ours.param_groups[0][key] == pytest.approx(theirs.param_groups[0][key], rel=1e-9, abs=1e-12), epoch
        theirs.step()
        reference.step()
        scheduler.step(epoch + 1)


def test_polynomial_is_that_of_torch_under_another_name() -> None:
    theirs = sgd()
    reference = lr_scheduler.PolynomialLR(theirs, total_iters=8, power=2.0)
    for epoch in range(12):
        assert FORMULAS["PolynomialLR"](BASE, epoch, T_max=8, power=2.0) == pytest.approx(rate(theirs), abs=1e-12)
        theirs.step()
        reference.step()


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True).map(sorted),
    st.integers(0, 70),
    st.floats(0.05, 1),
)
def test_equal_gammas_are_one_gamma(milestones: list[int], n: int, gamma: float) -> None:
    many = FORMULAS["MultiStepMultiGammaLR"](BASE, n, milestones=milestones, gammas=[gamma] * len(milestones))
    assert many == pytest.approx(FORMULAS["MultiStepLR"](BASE, n, milestones=milestones, gamma=gamma))


# ------------------------------------------------------------------------------------------------ tables and torch

NOT_PLAIN = {"self", "optimizer", "last_epoch", "verbose", "scale_fn", "scale_mode"}


def plain_arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - NOT_PLAIN


def arguments(cls: str) -> set[str]:
    """What a schedule may say of a class, in torch's spelling."""
    return set(LR_CLASSES[cls].fields) - ({"T_max"} if cls == "PolynomialLR" else set())


@pytest.mark.parametrize("cls", sorted(set(lr_scheduler.__all__) - {"LRScheduler"} - set(LR_REFUSED)))
def test_arguments_are_those_of_torch_and_none_is_forgotten(cls: str) -> None:
    assert arguments(cls) == plain_arguments(getattr(lr_scheduler, cls))


@pytest.mark.parametrize("cls", LR_CLASSES)
def test_every_argument_that_loads_has_a_meaning(cls: str) -> None:
    if cls in FORMULAS:
        moments = plain_arguments(MOMENTA[cls]) | {"cycle_momentum"} if cls in MOMENTA else set()
        taken = (plain_arguments(FORMULAS[cls]) | moments) - {"base", "n", "_rates"}
        assert taken == set(LR_CLASSES[cls].fields) - ({"total_iters"} if cls == "PolynomialLR" else set())


def test_what_loads_can_be_made() -> None:
    assert set(LR_CLASSES) == {*FORMULAS, "ReduceLROnPlateau"}


def test_an_unknown_class() -> None:
    with pytest.raises(QlibError, match=r"unknown learning-rate scheduler 'StepLr'; .* did you mean StepLR"):
        make_lr_scheduler(component("StepLr"), sgd())


# ------------------------------------------------------------------------------------------------ schedules


def test_a_policy_that_begins_late_counts_from_the_start_of_the_run() -> None:
    rates = run(read_schedule(PUBLISHED / "base_step.yaml", 180), sgd(), 180)
    assert rates == [BASE * 0.1 ** (epoch // 45) for epoch in range(180)]


def test_published_milestones() -> None:
    schedule = read_schedule(PUBLISHED / "dorefa_w3a8.yaml", 200)
    rates = run(Schedule(schedule.of("lr_schedulers")), sgd(), 200)
    changes = {epoch: rates[epoch] for epoch in range(1, 200) if rates[epoch] != rates[epoch - 1]}
    assert changes == pytest.approx({80: 0.04, 120: 0.004, 160: 0.0008})


def test_a_policy_that_ended_leaves_its_last_rate() -> None:
    schedule = Schedule((PolicySpec(component("ExponentialLR", gamma=0.5), 1, 3),))
    assert run(schedule, sgd(1.0), 6) == [1.0, 1.0, 0.25, 0.125, 0.125, 0.125]


def test_a_warm_up_before_another_scheduler() -> None:
    warm = Component("lr_schedulers", "warm", "LinearLR", {"start_factor": 0.25, "total_iters": 3})
    cosine = Component("lr_schedulers", "cosine", "CosineAnnealingLR", {"T_max": 8})
    schedule = Schedule((PolicySpec(warm, 0, 3), PolicySpec(cosine, 3, 8)))
    expected = [0.25, 0.5, 0.75, 1.0] + [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(4, 8)]
    assert run(schedule, sgd(1.0), 8) == pytest.approx(expected)


def test_groups_keep_their_ratio_and_later_ones_join() -> None:
    optimizer = sgd(1.0, 0.01)
    scheduler = make_lr_scheduler(component("CosineAnnealingLR", T_max=4, eta_min=0.5), optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})
    for epoch, expected in ((2, 0.75), (4, 0.5)):
        scheduler.step(epoch)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [expected, expected / 100, expected / 10]
        )


def test_a_rate_of_zero_stays() -> None:
    optimizer = sgd(0.0)
    make_lr_scheduler(component("StepLR", step_size=2), optimizer).step(2)
    assert rate(optimizer) == 0.0


def test_adam_moves_its_first_beta() -> None:
    optimizer = Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.99))
    make_lr_scheduler(component("CyclicLR", base_lr=0.1, max_lr=1.0, step_size_up=2), optimizer).step(2)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.8, 0.99))


def test_an_optimizer_without_momentum() -> None:
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError) as caught:
        make_lr_scheduler(component("OneCycleLR", max_lr=1.0, total_steps=9), optimizer)
    expected = "a.yaml:2: OneCycleLR moves the momentum, and Adagrad has none; add cycle_momentum: false"
    assert str(caught.value) == expected


def test_one_cycle_of_steps_learns_how_long_an_epoch_is() -> None:
    policy = PolicySpec(component("OneCycleLR", max_lr=1.0, epochs=2), 0, 2, args={"per": "step"})
    optimizer = sgd()
    assert counts_steps(policy)
    assert not counts_steps(PolicySpec(policy.component, 0, 2))
    scheduler = make_lr_scheduler(policy.component, optimizer, steps_per_epoch=10)
    rates = []
    for step in range(20):
        rates.append(rate(optimizer))
        scheduler.step(step + 1)
    assert max(rates) == rates[5] == 1.0
    assert rates[-1] == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize(
    ("settings", "results", "expected"),
    [
        pytest.param({"patience": 1}, [3.0, 2.0, 2.0, 2.0, 1.0], [1, 1, 1, 0.1, 0.1], id="loss"),
        pytest.param({"patience": 0, "mode": "max", "factor": 0.5}, [3.0, 4.0, 4.0, 5.0, 5.0], [1, 1, 0.5, 0.5, 0.25],
                     id="Top1"),
    ],
)  # fmt: skip
def test_plateau(settings: dict[str, Any], results: list[float], expected: list[float]) -> None:
    optimizer, metric = sgd(1.0), "top1" if settings.get("mode") == "max" else "loss"
    scheduler = make_lr_scheduler(component("ReduceLROnPlateau", **settings), optimizer)
    rates = []
    for epoch, result in enumerate(results):
        scheduler.step(epoch + 1, {"loss": math.nan, "top1": math.nan, metric: result})
        rates.append(rate(optimizer))
    assert rates == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ resume

ALL = [*CASES, pytest.param("ReduceLROnPlateau", {"patience": 1, "cooldown": 1}, id="plateau")]
LOSSES = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 1.5]


def rates_from(scheduler: LrScheduler, optimizer: Optimizer, start: int) -> list[tuple[float, float]]:
    found = []
    for epoch in range(start, len(LOSSES)):
        found.append((rate(optimizer), optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step(epoch + 1, {"loss": LOSSES[epoch]})
    return found


@pytest.mark.parametrize("optimizer_first", [True, False], ids=["optimizer first", "scheduler first"])
@pytest.mark.parametrize(("cls", "settings"), ALL)
def test_a_resumed_run_has_the_same_rates(cls: str, settings: dict[str, Any], optimizer_first: bool) -> None:
    whole = sgd()
    expected = rates_from(make_lr_scheduler(component(cls, **settings), whole), whole, 0)
    for stop in (1, 4, 7):
        first, second = sgd(), sgd(9.0)
        scheduler = make_lr_scheduler(component(cls, **settings), first)
        for epoch in range(stop):
            first.step()
            scheduler.step(epoch + 1, {"loss": LOSSES[epoch]})
        state = json.loads(json.dumps(scheduler.state_dict()))
        if optimizer_first:
            second.load_state_dict(first.state_dict())
        resumed = make_lr_scheduler(component(cls, **settings), second, last_epoch=stop - 1)
        resumed.load_state_dict(state)
        if not optimizer_first:
            second.load_state_dict(first.state_dict())
        assert rates_from(resumed, second, stop) == expected[stop:]
