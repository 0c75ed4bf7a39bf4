"""The learning rate as a pure function of the epochs, or steps, that are done.

Each formula takes the base rate, the number of epochs done (0 before the first) and the arguments that a schedule
gives. It agrees with the class of torch.optim.lr_scheduler of the same name stepped once an epoch from 0, but can be
asked for any epoch: a schedule that begins late, or is resumed, needs no history.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from qlib.config.layers.keys import Field, setting
from qlib.config.schedule.keys import (
    FACTOR,
    FROM_0,
    GAMMAS,
    MILESTONES,
    POSITIVE,
    SHARE,
    ClassFields,
    count,
    one_of,
    table,
)
from qlib.registry import Registry
from qlib.values import FLAG, Value

__all__ = ["ARGUMENTS", "FORMULAS", "Formula", "MOMENTA", "formula", "momentum"]

Formula: TypeAlias = Callable[..., float]

FORMULAS: Registry[Formula] = Registry("learning-rate scheduler")
"""Class name in a schedule -> the rate after n epochs, or steps."""

ARGUMENTS: dict[str, ClassFields] = {}
"""Class name in a schedule -> what it may give a formula."""

MOMENTA: dict[str, Formula] = {}
"""Class name -> the momentum after n epochs, or steps, of those that move it unless told not to."""


def formula(name: str, *, either: tuple[str, ...] = (), **keys: Value | Field) -> Callable[[Formula], Formula]:
    """Registers a formula with the keys that a schedule may give it: exactly one of `either`, and all without default.

    >>> ARGUMENTS["StepLR"].needs, ARGUMENTS["PolynomialLR"].needs
    ((('step_size',),), (('T_max', 'total_iters'),))
    """

    def decorate(function: Formula) -> Formula:
        parameters = inspect.signature(function).parameters.values()
        needed = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
        alone = tuple((each,) for each in needed if each not in either)
        ARGUMENTS[name] = ClassFields(table(**keys), (*alone, either) if either else alone)
        FORMULAS.add(name, function)
        return function

    return decorate


def momentum(name: str) -> Callable[[Formula], Formula]:
    """Registers the momentum that goes with a formula, and the keys that it adds to those of that."""

    def decorate(function: Formula) -> Formula:
        added = table(cycle_momentum=FLAG, base_momentum=SHARE, max_momentum=SHARE)
        ARGUMENTS[name] = replace(ARGUMENTS[name], fields={**ARGUMENTS[name].fields, **added})
        MOMENTA[name] = function
        return function

    return decorate


@formula("StepLR", step_size=count(1), gamma=POSITIVE)
def step_lr(base: float, n: int, *, step_size: int, gamma: float = 0.1) -> float:
    """``base * gamma ** floor(n / step_size)``.

    >>> [round(step_lr(0.1, n, step_size=45), 6) for n in (0, 44, 45, 89, 90)]
    [0.1, 0.1, 0.01, 0.01, 0.001]
    """
    return float(base * gamma ** (n // step_size))


@formula("MultiStepLR", milestones=MILESTONES, gamma=POSITIVE)
def multi_step_lr(base: float, n: int, *, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """``base * gamma ** (number of milestones up to n)``.

    >>> [round(multi_step_lr(1.0, n, milestones=(60, 120)), 6) for n in (59, 60, 120)]
    [1.0, 0.1, 0.01]
    """
    return float(base * gamma ** bisect_right(milestones, n))


@formula("MultiStepMultiGammaLR", milestones=MILESTONES, gammas=GAMMAS)
def multi_step_multi_gamma_lr(base: float, n: int, *, milestones: Sequence[int], gammas: Sequence[float]) -> float:
    """``base`` times the gammas of all milestones up to n: they are cumulative.

    >>> [round(multi_step_multi_gamma_lr(1.0, n, milestones=(80, 120), gammas=(0.1, 0.5)), 6) for n in (79, 80, 120)]
    [1.0, 0.1, 0.05]
    """
    return base * math.prod(gammas[: bisect_right(milestones, n)])


@formula("ConstantLR", factor=FACTOR, total_iters=count(0))
def constant_lr(base: float, n: int, *, factor: float = 1 / 3, total_iters: int = 5) -> float:
    """``base * factor`` before `total_iters`, then ``base``.

    >>> [constant_lr(1.0, n, factor=0.5) for n in (0, 4, 5)]
    [0.5, 0.5, 1.0]
    """
    return base * factor if n < total_iters else base


@formula("LinearLR", start_factor=FACTOR, end_factor=SHARE, total_iters=count(1))
def linear_lr(
    base: float, n: int, *, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5
) -> float:
    """``base`` times a factor that goes in a straight line from `start_factor` to `end_factor`, and stays there.

    >>> [linear_lr(1.0, n, start_factor=0.5, total_iters=4) for n in (0, 2, 4, 9)]
    [0.5, 0.75, 1.0, 1.0]
    """
    return base * (start_factor + (end_factor - start_factor) * min(n, total_iters) / total_iters)


@formula("ExponentialLR", gamma=POSITIVE)
def exponential_lr(base: float, n: int, *, gamma: float) -> float:
    """``base * gamma ** n``.

    >>> exponential_lr(1.0, 3, gamma=0.5)
    0.125
    """
    return float(base * gamma**n)


@formula(
    "PolynomialLR",
    either=("T_max", "total_iters"),
    T_max=count(1),
    total_iters=setting(count(1), "T_max"),
    power=POSITIVE,
)
def polynomial_lr(base: float, n: int, *, T_max: int, power: float = 1.0) -> float:
    """``base * (1 - n / T_max) ** power``, and 0 after T_max, which torch calls `total_iters`.

    >>> [polynomial_lr(1.0, n, T_max=4, power=2) for n in (0, 2, 4, 5)]
    [1.0, 0.25, 0.0, 0.0]
    """
    return float(base * (1 - min(n, T_max) / T_max) ** power)


@formula("CosineAnnealingLR", T_max=count(1), eta_min=FROM_0)
def cosine_annealing_lr(base: float, n: int, *, T_max: int, eta_min: float = 0.0) -> float:
    """``eta_min + (base - eta_min) * (1 + cos(pi * n / T_max)) / 2``: it rises again after T_max.

    References:
        Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.

    >>> [round(cosine_annealing_lr(1.0, n, T_max=20), 6) for n in (0, 10, 20, 30)]
    [1.0, 0.5, 0.0, 0.5]
    """
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * n / T_max)) / 2


@formula("CosineAnnealingWarmRestarts", T_0=count(1), T_mult=count(1), eta_min=FROM_0)
def cosine_annealing_warm_restarts(base: float, n: int, *, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> float:
    """A cosine from ``base`` to `eta_min` that starts again after T_0 epochs, then after T_0 * T_mult, and so on.

    >>> [round(cosine_annealing_warm_restarts(1.0, n, T_0=2, T_mult=2), 6) for n in (0, 1, 2, 4, 6)]
    [1.0, 0.5, 1.0, 0.5, 1.0]
    """
    period = T_0
    if T_mult == 1:
        n %= period
    while n >= period:
        n, period = n - period, period * T_mult
    return cosine_annealing_lr(base, n, T_max=period, eta_min=eta_min)


def _height(n: int, up: int, down: int | None, mode: str, gamma: float) -> float:
    """Where a triangle wave stands, from 0 to 1, times what its cycle is scaled by."""
    total = up + (down or up)
    done = n % total
    height = done / up if done <= up else (total - done) / (total - up)
    scales = {"triangular": 1.0, "triangular2": 0.5 ** (n // total), "exp_range": gamma**n}
    return height * scales[mode]


@formula(
    "CyclicLR",
    base_lr=FROM_0,
    max_lr=POSITIVE,
    step_size_up=count(1),
    step_size_down=count(1, null=True),
    mode=one_of("triangular", "triangular2", "exp_range"),
    gamma=POSITIVE,
)
def cyclic_lr(
    base: float,
    n: int,
    *,
    base_lr: float,
    max_lr: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> float:
    """A triangle wave between `base_lr` and `max_lr`, whose cycles may shrink; ``base`` is not used.

    References:
        Smith: Cyclical Learning Rates for Training Neural Networks, 2017.

    >>> [cyclic_lr(1.0, n, base_lr=0.0, max_lr=1.0, step_size_up=2, mode="triangular2") for n in range(7)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5]
    """
    return base_lr + (max_lr - base_lr) * _height(n, step_size_up, step_size_down, mode, gamma)


@momentum("CyclicLR")
def cyclic_momentum(
    n: int,
    *,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    **_rates: float,
) -> float:
    """The momentum that goes with `cyclic_lr`: high where the rate is low."""
    return max_momentum - (max_momentum - base_momentum) * _height(n, step_size_up, step_size_down, mode, gamma)


def _one_cycle(n: int, total: int, share: float, three: bool, strategy: str, points: Sequence[float]) -> float:
    """A path through `points`: the first two in `share` of the steps, in `three` phases the next two as fast."""
    first = share * total - 1
    ends = [0.0, first, 2 * first, total - 1.0] if three else [0.0, first, total - 1.0]
    n = min(n, total - 1)
    phase = next((i for i, end in enumerate(ends[1:-1]) if n <= end), len(ends) - 2)
    start, end = list(pairwise(ends))[phase]
    done = (n - start) / (end - start) if end != start else 1.0
    done = (1 - math.cos(math.pi * done)) / 2 if strategy == "cos" else done
    return points[phase] + (points[phase + 1] - points[phase]) * done


@formula(
    "OneCycleLR",
    either=("total_steps", "epochs"),
    max_lr=POSITIVE,
    total_steps=count(2),
    epochs=count(1),
    steps_per_epoch=count(1),
    pct_start=SHARE,
    anneal_strategy=one_of("cos", "linear"),
    div_factor=POSITIVE,
    final_div_factor=POSITIVE,
    three_phase=FLAG,
)
def one_cycle_lr(
    base: float,
    n: int,
    *,
    max_lr: float,
    total_steps: int | None = None,
    epochs: int = 0,
    steps_per_epoch: int = 1,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> float:
    """Up from ``max_lr / div_factor`` to `max_lr`, then down to a `final_div_factor`-th of the start; no base rate.

    The last rate is kept after `total_steps`, which may be given as `epochs` times `steps_per_epoch`.

    References:
        Smith, Topin: Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.

    >>> [round(one_cycle_lr(1.0, n, max_lr=1.0, total_steps=10, div_factor=4, pct_start=0.5), 4) for n in (0, 2, 4, 9)]
    [0.25, 0.625, 1.0, 0.0]
    """
    low = max_lr / div_factor
    points = [low, max_lr, low, low / final_div_factor] if three_phase else [low, max_lr, low / final_div_factor]
    return _one_cycle(n, total_steps or epochs * steps_per_epoch, pct_start, three_phase, anneal_strategy, points)


@momentum("OneCycleLR")
def one_cycle_momentum(
    n: int,
    *,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    total_steps: int | None = None,
    epochs: int = 0,
    steps_per_epoch: int = 1,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
    **_rates: float,
) -> float:
    """The momentum that goes with `one_cycle_lr`: high where the rate is low."""
    points = [max_momentum, base_momentum, max_momentum, max_momentum]
    return _one_cycle(n, total_steps or epochs * steps_per_epoch, pct_start, three_phase, anneal_strategy, points)
