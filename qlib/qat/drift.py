"""Learned scales that run away: training goes on, but what it learns is worth nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["MAX_DRIFT", "ScaleDrift"]

MAX_DRIFT = 4.0
"""Scales that learn well stay within a few percent of where they began, or some ten at 2 bits."""


class ScaleDrift:
    """Remembers where the learned scales of quantizers, parameters called `scale`, began; others do not count.

    >>> learned = nn.Module()
    >>> learned.scale = nn.Parameter(torch.tensor([0.5, 0.25]))
    >>> drift = ScaleDrift()
    >>> drift.watch({"conv1.weight": learned})
    >>> learned.scale.data[1] = 2.0
    >>> drift.worst()
    ('conv1.weight', 8.0)
    """

    def __init__(self) -> None:
        self._began: dict[str, tuple[nn.Module, Tensor]] = {}

    def watch(self, quantizers: Mapping[str, nn.Module]) -> None:
        """Watches these and no others; one that was watched before began where it then was."""
        began = dict(self._began.values())
        learning = {name: each for name, each in quantizers.items() if isinstance(_scale(each), nn.Parameter)}
        self._began = {
            name: (each, began[each] if each in began else _scale(each).detach().clone())  # type: ignore[union-attr]
            for name, each in learning.items()
        }

    def worst(self) -> tuple[str, float]:
        """The one that has moved most, and by which factor, up or down; an empty name where none is watched."""
        moved = [("", 1.0)]
        for name, (module, began) in self._began.items():
            scale = _scale(module)
            assert scale is not None
            ratio = (scale.detach().abs() / began.to(scale.device)).clamp(min=torch.finfo(scale.dtype).tiny)
            moved.append((name, float(torch.maximum(ratio, 1 / ratio).max())))
        return max(moved, key=lambda each: each[1])


def _scale(module: nn.Module) -> Tensor | None:
    scale = getattr(module, "scale", None)
    return scale if isinstance(scale, Tensor) else None
