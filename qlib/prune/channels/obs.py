"""OBS by channel: what removing a channel costs when the others make up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlib.prune.channels._base import CHANNEL_PRUNERS, Consumer
from qlib.prune.methods.obs import damped_inverse

__all__ = ["order_by_obs"]


class _State:
    """The weights of a consumer that are left, and the inverse moments of the inputs that are left."""

    def __init__(self, consumer: Consumer) -> None:
        self.weight = consumer.weight.double().clone()
        self.inverse = damped_inverse(consumer.moments)
        self.importance = consumer.importance.double()
        self.classes = consumer.classes

    def losses(self, numbers: Tensor) -> Tensor:
        """``sum_o importance_o w_oB inverse(inverse_BB) w_oB`` for the inputs B of each class; 0 of one that it lacks.

        >>> consumer = Consumer(torch.tensor([[3.0, 1.0]]), torch.eye(2).double(), torch.ones(1), torch.tensor([1, 2]))
        >>> _State(consumer).losses(torch.tensor([1, 2, 3])).round(decimals=1)
        tensor([9., 1., 0.], dtype=torch.float64)
        """
        found = torch.zeros(len(numbers), dtype=torch.float64)
        for columns, places in self._blocks(numbers):
            block = torch.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
            weight = self.weight[:, columns]  # [out, classes, columns]
            found[places] = torch.einsum("o,ocj,cjk,ock->c", self.importance, weight, block, weight)
        return found

    def remove(self, number: int) -> None:
        columns = (self.classes == number).nonzero().flatten()
        if not len(columns):
            return
        factor = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.weight -= self.weight[:, columns] @ factor
        self.inverse -= self.inverse[:, columns] @ factor
        self.weight[:, columns] = 0.0

    def _blocks(self, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Columns ``[classes, columns]`` of those classes that have equally many, and their places among `numbers`."""
        counts = torch.tensor([int((self.classes == number).sum()) for number in numbers.tolist()])
        for count in torch.unique(counts[counts > 0]).tolist():
            places = (counts == count).nonzero().flatten()
            yield torch.stack([(self.classes == n).nonzero().flatten() for n in numbers[places].tolist()]), places


@CHANNEL_PRUNERS.register("channels-obs", order=10, images=True)
@torch.no_grad()
def order_by_obs(ranges: Sequence[range], consumers: Sequence[Consumer]) -> list[list[tuple[int, float]]]:
    """In each range, the class first whose removal adds least to the errors of all that read it, and so on.

    After each removal the weights of the readers are those of least error.

    References: Frantar and Alistarh, "Optimal brain compression", 2022; Kurtic et al., "ZipLM", 2023.

    Of two channels that are twins the first goes for nothing, though its weight is the largest.

    >>> twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    >>> reader = Consumer(torch.tensor([[3.0, 3.5, 1.0]]), twins, torch.ones(1), torch.tensor([1, 2, 3]))
    >>> [[number for number, _ in order] for order in order_by_obs([range(1, 4)], [reader])]
    [[1, 3]]
    """
    return [_order(numbers, [each for each in consumers if _reads(each, numbers)]) for numbers in ranges]


def _reads(consumer: Consumer, numbers: range) -> bool:
    return bool(((consumer.classes >= numbers.start) & (consumer.classes < numbers.stop)).any())


def _order(numbers: range, consumers: Sequence[Consumer]) -> list[tuple[int, float]]:
    states, left, order, last = [_State(each) for each in consumers], list(numbers), [], 0.0
    while len(left) > 1:
        losses = sum((state.losses(torch.tensor(left)) for state in states), torch.zeros(len(left)).double())
        place = int(losses.argmin())
        last = max(last, float(losses[place]))  # without those before, this one would not be so cheap
        order.append((left.pop(place), last))
        for state in states:
            state.remove(order[-1][0])
    return order
