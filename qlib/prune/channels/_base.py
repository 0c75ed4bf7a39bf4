"""What a method that removes channels is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from qlib.registry import Registry

__all__ = ["CHANNEL_PRUNERS", "Consumer", "OrderChannels"]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads channels: the classes of its inputs are those of the columns of its weight.

    `weight [out, in]`, `moments [in, in]` of its inputs and `importance [out]` of its outputs as `methods._base.Seen`
    has them; `classes [in]`, 0 for a column that always stays.
    """

    weight: Tensor
    moments: Tensor
    importance: Tensor
    classes: Tensor


OrderChannels: TypeAlias = Callable[[Sequence[range], Sequence[Consumer]], list[list[tuple[int, float]]]]
"""Ranges of classes, and who reads them -> for each range its classes in the order in which they go, each with what
its removal adds to the loss; the last one of a range stays."""

CHANNEL_PRUNERS: Registry[OrderChannels] = Registry("method of removing channels", "qlib.prune.channels")
"""Facts of a registration: `order` in `--help`; `images`: it looks at calibration images."""
