"""Bits for each group under a budget: an integer program over one-hot choices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

__all__ = ["Choice", "Costs", "allocate", "best_uniform", "cost_of", "error_of", "smallest_cost"]

Choice: TypeAlias = tuple[int, ...]
"""For each group the index of its option."""


@dataclass(frozen=True)
class Costs:
    """What a choice costs, in whole numbers: the sum of each group's own, and of each pair's.

    ``single[g][i]`` is the cost of option i of group g; ``pairs[g, h][i][j]`` that of option i of g together with
    option j of h. A group with one option is fixed.
    """

    single: Sequence[Sequence[int]]
    pairs: Mapping[tuple[int, int], Sequence[Sequence[int]]] = field(default_factory=dict)


def cost_of(costs: Costs, choice: Sequence[int]) -> int:
    """The cost of a choice.

    >>> cost_of(Costs([[1, 2], [10, 20]], {(0, 1): [[100, 200], [300, 400]]}), (0, 1))
    221
    """
    own = sum(options[i] for options, i in zip(costs.single, choice, strict=True))
    return own + sum(table[choice[g]][choice[h]] for (g, h), table in costs.pairs.items())


def error_of(errors: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """The sum of the errors of the options chosen."""
    return sum(options[i] for options, i in zip(errors, choice, strict=True))


def allocate(costs: Costs, errors: Sequence[Sequence[float]], budget: int) -> Choice | None:
    """The choice of least error whose cost is at most `budget`; None where there is none.

    ``min sum e x``, ``x`` one-hot in each group, ``sum c x + sum d y <= budget``, where ``y[g, h]`` holds the products
    of the options of a pair: its rows sum to ``x[g]``, its columns to ``x[h]``, which makes it 0 or 1 where x is.

    >>> allocate(Costs([[1, 2], [1, 2]]), [[5.0, 0.0], [3.0, 0.0]], 3)
    (1, 0)
    """
    uniform = best_uniform(costs, errors, budget)
    limit = float(budget)
    while True:
        found = _solve(costs, errors, limit)
        if found is None or cost_of(costs, found) <= budget:
            break
        limit -= max(1e-6 * abs(budget), cost_of(costs, found) - budget)  # the solver keeps constraints up to 1e-6
    options = [choice for choice in (found, uniform) if choice is not None]
    return min(options, key=lambda choice: error_of(errors, choice), default=None)


def best_uniform(costs: Costs, errors: Sequence[Sequence[float]], budget: int) -> Choice | None:
    """Of the choices that take the i-th option (or the only one) everywhere, the best within the budget."""
    count = max(map(len, costs.single), default=0)
    within = []
    for i in range(count):
        if all(len(options) in (1, count) for options in costs.single):
            choice = tuple(min(i, len(options) - 1) for options in costs.single)
            within += [choice] * (cost_of(costs, choice) <= budget)
    return min(within, key=lambda choice: error_of(errors, choice), default=None)


def smallest_cost(costs: Costs) -> int:
    """The cost of the cheapest choice: that of the first options, where an option is never cheaper than those before.

    >>> smallest_cost(Costs([[1, 2], [10, 20]]))
    11
    """
    return cost_of(costs, (0,) * len(costs.single))


def _solve(costs: Costs, errors: Sequence[Sequence[float]], limit: float) -> Choice | None:
    """The integer program as scipy takes it: columns are the x of all groups, then the y of all pairs."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    starts = np.cumsum([0, *map(len, costs.single)])
    weights: list[float] = [float(cost) for options in costs.single for cost in options]
    objective = [float(error) for options in errors for error in options]
    rows = _Rows()
    for g, options in enumerate(costs.single):
        rows.add({starts[g] + i: 1.0 for i in range(len(options))}, 1.0)
    for (g, h), table in costs.pairs.items():
        first, wide = len(weights), len(table[0])
        for i in range(len(table)):
            rows.add({starts[g] + i: -1.0} | {first + i * wide + j: 1.0 for j in range(wide)}, 0.0)
        for j in range(wide):
            rows.add({starts[h] + j: -1.0} | {first + i * wide + j: 1.0 for i in range(len(table))}, 0.0)
        weights += [float(cost) for row in table for cost in row]
    scale = max(1.0, max(weights, default=1.0))
    worst = max(max(objective, default=0.0), 1e-300)
    objective = [error / worst for error in objective] + [0.0] * (len(weights) - len(objective))
    result = milp(
        objective,
        integrality=[int(column < starts[-1]) for column in range(len(weights))],
        bounds=Bounds(0, 1),
        constraints=[
            rows.constraint(len(weights)),
            LinearConstraint(np.array([weights]) / scale, -np.inf, limit / scale),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts))


class _Rows:
    """The rows of a sparse matrix, each with what it must be equal to."""

    def __init__(self) -> None:
        self.rows: list[dict[Any, float]] = []
        self.right: list[float] = []

    def add(self, row: dict[Any, float], right: float) -> None:
        self.rows.append(row)
        self.right.append(right)

    def constraint(self, columns: int) -> LinearConstraint:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array

        entries = [(i, int(j), value) for i, row in enumerate(self.rows) for j, value in row.items()]
        where = ([i for i, _, _ in entries], [j for _, j, _ in entries])
        matrix = coo_array(([value for _, _, value in entries], where), shape=(len(self.rows), columns))
        return LinearConstraint(matrix.tocsr(), self.right, self.right)
