"""Group norm: channels whose weights are small matter least."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlib.prune.channels._base import CHANNEL_PRUNERS, Consumer

__all__ = ["order_by_norm"]


@CHANNEL_PRUNERS.register("group-norm", order=20, images=False)
def order_by_norm(ranges: Sequence[range], consumers: Sequence[Consumer]) -> list[list[tuple[int, float]]]:
    """By the mean over the readers of ``sum w^2`` of a class, as a share of the range's mean.

    References: Fang et al., "DepGraph: towards any structural pruning", 2023, section 3.3, of what reads the channels.

    >>> reader = Consumer(torch.tensor([[3.0, 1.0]]), torch.eye(2), torch.ones(1), torch.tensor([1, 2]))
    >>> order_by_norm([range(1, 3)], [reader])
    [[(2, 0.2)]]
    """
    found = []
    for numbers in ranges:
        squares = torch.zeros(len(numbers), dtype=torch.float64)
        for each in consumers:
            own = torch.zeros(max(int(each.classes.max()), numbers.stop) + 1, dtype=torch.float64)
            own.index_add_(0, each.classes, each.weight.double().square().sum(0))
            squares += own[numbers.start : numbers.stop]
        shares = squares / squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
        order = torch.argsort(shares, stable=True).tolist()
        found.append([(numbers[place], float(shares[place])) for place in order[:-1]])
    return found
