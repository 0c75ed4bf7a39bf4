"""Parts of a dataset, as sorted indices: the same for the same seed, on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _permutation(n: int, seed: int) -> list[int]:
    # RandomState, since numpy promises to keep its numbers for ever.
    return [int(index) for index in np.random.RandomState(seed).permutation(n)]


def choose_subset(n: int, fraction: float, seed: int, *, shuffled: bool = False) -> list[int]:
    """A random `fraction` (above 0, to 1) of the indices 0 .. n-1, sorted or in random order; at least one.

    >>> choose_subset(10, 0.3, seed=0)
    [2, 4, 8]
    >>> choose_subset(10, 0.3, seed=0, shuffled=True)
    [2, 8, 4]
    >>> choose_subset(3, 0.01, seed=0), choose_subset(3, 1.0, seed=0)
    ([2], [0, 1, 2])
    """
    assert n > 0
    assert 0 < fraction <= 1
    chosen = _permutation(n, seed)[: max(1, round(n * fraction))]
    return chosen if shuffled else sorted(chosen)


def split_train(n: int, validation_split: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices 0 .. n-1 in two random parts, for training and for validation, each sorted.

    `validation_split` (0 to below 1) is the validation part's share, rounded down.

    >>> split_train(5, 0.4, seed=0)
    ([1, 3, 4], [0, 2])
    """
    assert 0 <= validation_split < 1
    order = _permutation(n, seed)
    held_out = int(n * validation_split)
    return sorted(order[held_out:]), sorted(order[:held_out])


def epoch_order(indices: Sequence[int], fraction: float, seed: int, epoch: int) -> list[int]:
    """The `indices` in the random order of an epoch, or a `fraction` of them, drawn anew in each; at least one.

    >>> epoch_order([10, 11, 12, 13], 0.5, seed=0, epoch=0), epoch_order([10, 11, 12, 13], 0.5, seed=0, epoch=1)
    ([10, 12], [11, 12])
    """
    assert 0 < fraction <= 1
    order = np.random.RandomState([seed, epoch]).permutation(len(indices))
    return [indices[place] for place in order[: max(1, round(len(indices) * fraction))]]
