"""What a pruning method is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from qlib.registry import Registry

__all__ = ["PRUNERS", "Score", "Seen"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a method may know of a layer besides its weight ``[out, in]``.

    `moments`: ``sum x x^T [in, in]`` of its inputs in float64, the unit matrix for a method that looks at no images.
    `importance [out]`: how much an error in each output changes the logits. `group [in]`, if there are such: in each
    row, of the inputs of one group at most `most` may go.
    """

    moments: Tensor
    importance: Tensor | None = None
    group: Tensor | None = None
    most: int = 0


Score: TypeAlias = Callable[[Tensor, Seen], Tensor]
"""Weight ``[out, in]`` -> the score of each of its elements, in float64: those of the least scores go first."""

PRUNERS: Registry[Score] = Registry("pruning method", "qlib.prune.methods")
"""Facts of a registration are the fields of `config.flags.pruning.PrunerFacts`."""
