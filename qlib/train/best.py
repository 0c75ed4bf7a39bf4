"""Which epochs were the best, and how sparse the weights are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["EpochScore", "nonzero", "ranked"]


@dataclass(frozen=True)
class EpochScore:
    """The result of an epoch: validation's Top1, Top5 and loss, and how many weights are not zero."""

    epoch: int
    top1: float
    top5: float
    loss: float
    sparsity: float
    nonzero: int

    def __str__(self) -> str:
        """The line that people grep for.

        >>> print(EpochScore(3, 92.1, 99.7, 0.33, 0.0, 270896))
        ==> Best [Top1: 92.100   Top5: 99.700   Sparsity:0.00   NNZ-Params: 270896 on epoch: 3]
        """
        return (
            f"==> Best [Top1: {self.top1:.3f}   Top5: {self.top5:.3f}   Sparsity:{self.sparsity:.2f}"
            f"   NNZ-Params: {self.nonzero} on epoch: {self.epoch}]"
        )

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def ranked(scores: Iterable[EpochScore], best_by: str, count: int) -> list[EpochScore]:
    """The `count` best scores, the best first: by Top1, Top5, then the later epoch; `sparsity` ranks by it before.

    >>> scores = [EpochScore(0, 90.0, 99.0, 0.3, 50.0, 10), EpochScore(1, 92.0, 99.0, 0.3, 0.0, 20)]
    >>> [ranked(scores, by, 1)[0].epoch for by in ("top1", "sparsity")]
    [1, 0]
    """

    def key(score: EpochScore) -> tuple[float, ...]:
        first = (-score.nonzero,) if best_by == "sparsity" else ()
        return (*first, score.top1, score.top5, score.epoch)

    return sorted(scores, key=key, reverse=True)[:count]


def nonzero(model: nn.Module) -> tuple[int, float]:
    """How many weights of 2 or more axes are not zero, and the share in percent of those that are.

    >>> import torch
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    >>> nonzero(layer)
    (3, 25.0)
    """
    weights: list[Tensor] = [value for value in model.parameters() if value.ndim > 1]
    total, left = sum(value.numel() for value in weights), sum(int(value.count_nonzero()) for value in weights)
    return left, 100 * (1 - left / total) if total else 0.0
