"""Magnitude pruning: how many are removed, which ones, and what happens to equal ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qlib.prune.magnitude import keep_largest, smallest_channels_mask, smallest_elements_mask, smallest_filters_mask

LEVELS = (0.0, 0.05, 0.3, 0.5, 0.99)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        pytest.param(smallest_elements_mask, lambda level: int(level * 6 * 5 * 9), id="elements"),
        pytest.param(smallest_filters_mask, lambda level: int(level * 6) * 5 * 9, id="filters"),
        pytest.param(smallest_channels_mask, lambda level: int(level * 5) * 6 * 9, id="channels"),
    ],
)
def test_counts_are_rounded_down_and_higher_levels_remove_more_of_the_same(
    mask: Callable[[torch.Tensor, float], torch.Tensor], count: Callable[[float], int]
) -> None:
    before = torch.ones(6, 5, 3, 3, dtype=torch.bool)
    for level in LEVELS:
        kept = mask(weight(6, 5, 3, 3), level)
        assert (kept.shape, kept.dtype) == ((6, 5, 3, 3), torch.bool)
        assert int((~kept).sum()) == count(level)
        assert not bool((kept & ~before).any())
        before = kept


def test_the_smallest_go() -> None:
    value = weight(4, 3, 2, 2)
    kept = smallest_elements_mask(value, 0.4)
    assert float(value[~kept].abs().max()) < float(value[kept].abs().min())
    value = value * torch.tensor([1.0, 100.0, 1.0, 0.01])[:, None, None, None]
    assert smallest_filters_mask(value, 0.25).flatten(1).any(1).tolist() == [True, True, True, False]
    value = weight(4, 3, 2, 2) * torch.tensor([9.0, 0.1, 5.0])[None, :, None, None]
    assert smallest_channels_mask(value, 0.4).transpose(0, 1).flatten(1).any(1).tolist() == [True, False, True]


def test_of_equal_ones_no_more_are_removed() -> None:
    assert int((~smallest_elements_mask(torch.ones(10), 0.3)).sum()) == 3
    assert keep_largest(torch.zeros(4), 4).tolist() == [False] * 4
