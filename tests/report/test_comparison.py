"""What changed between two evaluations of the same images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qlib.metrics import Evaluation, Meter, compare, mcnemar

LABELS = [0, 0, 1, 1, 2, 2]


def evaluation(predictions: list[int], labels: list[int] = LABELS) -> Evaluation:
    meter = Meter()
    meter.add(torch.eye(3)[predictions], torch.tensor(labels))
    return meter.result()


@pytest.mark.parametrize(
    ("before", "after", "lost", "won", "flips"),
    [
        pytest.param(LABELS, LABELS, 0, 0, (0, 0, 0), id="nothing changed"),
        pytest.param(LABELS, [1, 0, 1, 1, 2, 0], 2, 0, (1, 0, 1), id="lost"),
        pytest.param([1, 1, 1, 1, 2, 2], LABELS, 0, 2, (2, 0, 0), id="won"),
        pytest.param(
            [1, 0, 0, 0, 2, 2], [2, 0, 1, 2, 2, 0], 1, 1, (1, 2, 1), id="from wrong to wrong counts as a flip"
        ),
    ],
)
def test_compare(before: list[int], after: list[int], lost: int, won: int, flips: tuple[int, ...]) -> None:
    found = compare(torch.tensor(before), evaluation(after))
    assert (found.samples, found.lost, found.won, found.flips) == (6, lost, won, flips)
    assert found.agreement == pytest.approx(100 * (6 - sum(flips)) / 6)
    low, high = found.agreement_interval
    assert 0 <= low < found.agreement <= high + 1e-9 <= 100 + 1e-9
    assert found.p_value == mcnemar(lost, won)


def test_other_images_cannot_be_compared() -> None:
    with pytest.raises(AssertionError):
        compare(torch.tensor(LABELS[1:]), evaluation(LABELS))


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_many_images() -> None:
    assert mcnemar(20_000, 20_300) == pytest.approx(binomtest(20_000, 40_300, 0.5).pvalue, rel=1e-6)
