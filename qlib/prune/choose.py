"""Which weights go: masks from scores, by level in each row, in each layer or over all layers, or N of each M."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.prune.magnitude import keep_largest

__all__ = ["Pattern", "choose_masks", "choose_pattern"]


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of each `m` weights along the input channels, `n` are kept.

    >>> str(Pattern.of("2:4")), Pattern.of("2:4").level
    ('2:4', 0.5)
    """

    n: int
    m: int

    @classmethod
    def of(cls, text: str) -> Pattern:
        """The pattern that a text spells. Raises ValueError for others than 0 < N < M."""
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(text)
        return cls(int(found[1]), int(found[2]))

    @property
    def level(self) -> float:
        """The share of weights that go."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def groups(self, channels: int, kernel: int) -> Tensor:
        """The group of each input ``[channels * kernel]``: `m` channels at the same place of the kernel.

        >>> Pattern(1, 2).groups(4, 2)
        tensor([0, 1, 0, 1, 2, 3, 2, 3])
        """
        return (torch.arange(channels)[:, None] // self.m * kernel + torch.arange(kernel)).flatten()


def choose_masks(scores: Mapping[str, Tensor], level: float, scope: str) -> dict[str, Tensor]:
    """Layer -> mask of its weights ``[out, in]``, without the share `level` of least score.

    `scope`: ``row`` and ``layer`` take that share of each row or layer, ``global`` of all layers together.

    >>> scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}
    >>> choose_masks(scores, 0.5, "global")
    {'a': tensor([[False, False]]), 'b': tensor([[True, True]])}
    >>> choose_masks(scores, 0.5, "layer")
    {'a': tensor([[False,  True]]), 'b': tensor([[False,  True]])}
    """
    if scope == "row":
        return {name: torch.stack([_without(row, level) for row in each]) for name, each in scores.items()}
    if scope == "layer":
        return {name: _without(each, level) for name, each in scores.items()}
    kept = _without(torch.cat([each.flatten() for each in scores.values()]), level)
    parts = torch.split(kept, [each.numel() for each in scores.values()])
    return {name: part.view_as(each) for (name, each), part in zip(scores.items(), parts, strict=True)}


def _without(scores: Tensor, level: float) -> Tensor:
    return keep_largest(scores, int(level * scores.numel()))


def choose_pattern(scores: Tensor, group: Tensor, pattern: Pattern) -> Tensor:
    """The mask of a layer's weights ``[out, in]`` that keeps the `n` of best score of each group and row.

    >>> choose_pattern(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), torch.zeros(4, dtype=torch.int64), Pattern(2, 4))
    tensor([[ True, False, False,  True]])
    """
    by_group = scores[:, torch.argsort(group, stable=True)].view(len(scores), -1, pattern.m)
    best = by_group.argsort(stable=True, dim=-1, descending=True)[..., : pattern.n]
    kept = torch.zeros_like(by_group, dtype=torch.bool).scatter_(-1, best, True)
    mask = torch.empty_like(scores, dtype=torch.bool)
    mask[:, torch.argsort(group, stable=True)] = kept.view(len(scores), -1)
    return mask
