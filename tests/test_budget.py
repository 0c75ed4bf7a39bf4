"""Bits under a budget: the integer program against brute force, budgets as text, and the command line."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.search.allocate import Costs, allocate, best_uniform, cost_of, error_of, smallest_cost


@st.composite
def programs(draw: st.DrawFn) -> tuple[Costs, list[list[float]], int]:
    """Small instances: costs rise with the option, errors are whatever they are."""
    options = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    sizes = [draw(st.sampled_from([1, options])) for _ in range(groups)]
    single = [sorted(draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))) for n in sizes]
    pairs = {}
    for g, h in itertools.combinations(range(groups), 2):
        if draw(st.booleans()):
            macs = draw(st.integers(1, 9))
            pairs[g, h] = [[macs * (i + 1) * (j + 1) for j in range(sizes[h])] for i in range(sizes[g])]
    numbers = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))
    errors = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes]
    costs = Costs(single, pairs)
    return costs, errors, draw(st.integers(0, cost_of(costs, [n - 1 for n in sizes]) + 5))


@given(programs())
@settings(max_examples=150, deadline=None)
def test_the_best_choice_within_the_budget_is_found(program: tuple[Costs, list[list[float]], int]) -> None:
    costs, errors, budget = program
    found = allocate(costs, errors, budget)
    every = itertools.product(*(range(len(options)) for options in costs.single))
    within = [choice for choice in every if cost_of(costs, choice) <= budget]
    assert (found is None) == (not within) == (budget < smallest_cost(costs))
    if found is not None:
        assert cost_of(costs, found) <= budget
        best = min(error_of(errors, choice) for choice in within)
        assert error_of(errors, found) == pytest.approx(best, abs=1e-6)
        uniform = best_uniform(costs, errors, budget)
        assert uniform is None or error_of(errors, found) <= error_of(errors, uniform)


def test_large_costs_are_kept_to_the_last_unit() -> None:
    """A solver's tolerance of a millionth is 3 units here."""
    costs = Costs([[1_000_000, 1_500_000 + i] for i in range(2)])
    errors = [[1.0, 0.0], [1.1, 0.0]]
    assert allocate(costs, errors, 2_500_000) == (1, 0)
    assert allocate(costs, errors, 3_000_000) == (0, 1)
    assert allocate(costs, errors, 3_000_001) == (1, 1)
    assert allocate(costs, errors, 1_999_999) is None
