"""How many channels go of each range: greedily by loss for what is saved, until a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["removed_for"]


def removed_for(
    orders: Sequence[Sequence[tuple[int, float]]],
    count: int,
    cost: Callable[[Tensor], int],
    limit: float,
    round_to: int,
) -> list[int] | None:
    """The classes of 1..`count` to remove so that `cost`, of whether each stays ``[count + 1]``, is at most `limit`.

    `orders`: for each range of classes the order in which they go, with the loss that each adds; one more stays. A
    range shrinks to a multiple of `round_to` at once, and to that at least. None where the limit cannot be met.

    >>> removed_for([[(1, 0.1), (2, 5.0)], [(4, 1.0)]], 5, lambda keep: int(keep[1:].sum()), 3, 1)
    [1, 4]
    """
    keep, taken = torch.ones(count + 1, dtype=torch.bool), [0] * len(orders)
    now = cost(keep)
    while now > limit:
        best: tuple[float, int, int, int] | None = None
        for index, order in enumerate(orders):
            goal = _next(len(order) + 1, taken[index], round_to)
            if goal is None:
                continue
            step = [number for number, _ in order[taken[index] : goal]]
            keep[step] = False
            after = cost(keep)
            keep[step] = True
            loss = sum(loss for _, loss in order[taken[index] : goal])
            ratio = loss / max(now - after, 1e-9)
            if best is None or ratio < best[0]:
                best = (ratio, index, goal, after)
        if best is None:
            return None
        _, index, goal, now = best
        keep[[number for number, _ in orders[index][taken[index] : goal]]] = False
        taken[index] = goal
    return (~keep).nonzero().flatten().tolist()


def _next(size: int, taken: int, round_to: int) -> int | None:
    """How many are gone after the next step of a range of `size`; None where none is left.

    >>> _next(20, 0, 8), _next(20, 4, 8), _next(20, 12, 8), _next(3, 1, 1)
    (4, 12, None, 2)
    """
    kept = (size - taken - 1) // round_to * round_to
    return size - kept if kept >= round_to else None
