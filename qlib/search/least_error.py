"""Ranges that change each tensor least: where LAPQ may start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.lower.base import ActivationGrid
from qlib.quant.plan import Plan, TensorPlan, WeightPlan
from qlib.search.minimize import Vector, minimize
from qlib.search.ranges import Coordinate, factor, scaled
from qlib.search.replay import WEIGHT, Replay, Slot, grid_of, rounded, rounded_weight

__all__ = ["least_error", "mean_error"]

_BATCHES = 2
"""Batches of images whose values are looked at: a range has one or two numbers, and each image many values."""


def mean_error(x: Tensor, y: Tensor, p: float) -> float:
    """``mean |x - y|^p``.

    >>> mean_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]), 2.0)
    2.0
    """
    return float((x - y).abs().pow(p).mean(dtype=torch.float64))


@torch.inference_mode()
def least_error(
    graph: Graph,
    plan: Plan,
    coordinates: Sequence[Coordinate],
    batches: Sequence[tuple[Tensor, Tensor]],
    p: float,
    method: str,
) -> Vector:
    """For each coordinate the value with the least ``mean |y - y_q|^p`` of its first tensor y in the float model.

    Both ends of a range are found together.
    """
    replay = Replay(graph)
    modules = {name_of(node): module for node, module in layers(graph)}
    states = [replay.start(images) for images, _ in batches[:_BATCHES]]
    position, found = 0, np.zeros(len(coordinates))
    by_slot: dict[Slot, list[int]] = {}
    for i, coordinate in enumerate(coordinates):
        by_slot.setdefault(coordinate.slots[0], []).append(i)
    for slot, indices in by_slot.items():
        grid, module = grid_of(plan.layers[slot[0]], slot), modules[slot[0]]
        if slot[1] == WEIGHT:
            value = module.weight
            assert isinstance(value, Tensor)
        else:
            step = replay.position(slot)
            states = [replay.run(state, position, step) for state in states]
            position = step
            value = torch.cat([state[replay.steps[step].reads[0]] for state in states])

        def error(
            ends: Vector, value: Tensor = value, grid: TensorPlan | WeightPlan = grid, slot: Slot = slot
        ) -> float:
            low, high = factor(float(ends[0])), factor(float(ends[-1]))
            if isinstance(grid, WeightPlan):
                return mean_error(value, rounded_weight(modules[slot[0]], scaled(grid, low, high)), p)
            return mean_error(value, rounded(value, ActivationGrid.of(scaled(grid, low, high).qparams())), p)

        start = np.zeros(len(indices))
        result = minimize(error, start, method, {})
        better = error(result) <= error(start)
        found[indices] = result if better else start
    return found
