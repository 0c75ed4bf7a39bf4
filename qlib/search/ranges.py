"""The ranges of a plan as numbers that a search can move: how much wider or narrower each is than at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlib.graph import Graph
from qlib.graph.ir import is_layer, layer_inputs, layers, name_of
from qlib.graph.kinds import KINDS
from qlib.graph.walk import producer_of
from qlib.graph.weights import swap_channels
from qlib.quant.affine import range_of_weight
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.search.replay import OUTPUT, WEIGHT, Slot, grid_of, slots

__all__ = ["Coordinate", "coordinates_of", "factor", "scaled", "scaled_plan", "with_explicit_weights"]

_NARROWEST, _WIDEST = -20.0, 8.0
_RESOLUTION = 8
_Grid = TypeVar("_Grid", bound="TensorPlan | WeightPlan")


@dataclass(frozen=True)
class Coordinate:
    """Grids that have one range, in execution order, and which end of it moves: ``both``, ``min`` or ``max``."""

    slots: tuple[Slot, ...]
    end: str = "both"


def factor(value: float) -> float:
    """By how much a range grows: ``2^(v / 4)``, v rounded to eighths and kept within -20 and 8.

    >>> factor(0.0), factor(-4.0), factor(-4.01), factor(-99.0)
    (1.0, 0.5, 0.5, 0.03125)
    """
    clipped = min(max(value, _NARROWEST), _WIDEST)
    return float(2.0 ** (round(clipped * _RESOLUTION) / _RESOLUTION / 4))


def scaled(grid: _Grid, low: float, high: float) -> _Grid:
    """The grid with the ends of its range multiplied; the same object where both factors are 1.

    >>> from qlib.quant.spec import QuantSpec
    >>> narrower = scaled(TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-1.0, max=6.0), 1.0, 0.5)
    >>> narrower.clip, narrower.min, narrower.max
    ('lapq', -1.0, 3.0)
    """
    if low == high == 1 or grid.min is None or grid.max is None:
        return grid
    if isinstance(grid, WeightPlan):
        assert isinstance(grid.min, tuple)
        assert isinstance(grid.max, tuple)
        lows, highs = tuple(low * each for each in grid.min), tuple(high * each for each in grid.max)
        return replace(grid, clip="lapq", min=lows, max=highs)
    return replace(grid, clip="lapq", min=low * grid.min, max=high * grid.max, clip_parameters=())


def with_explicit_weights(graph: Graph, plan: Plan) -> Plan:
    """The plan with the ranges of weights written out; the weights become the same codes."""
    changed = dict(plan.layers)
    for node, module in layers(graph):
        layer = plan.layers[name_of(node)]
        if layer.weight is not None and layer.weight.min is None:
            assert isinstance(module.weight, Tensor)
            found = range_of_weight(swap_channels(module, module.weight.detach()), layer.weight.spec.axis)
            low, high = (tuple(end.double().reshape(-1).tolist()) for end in found)
            changed[name_of(node)] = replace(layer, weight=replace(layer.weight, min=low, max=high))
    return replace(plan, layers=changed)


def coordinates_of(graph: Graph, plan: Plan, both_ends: bool) -> list[Coordinate]:
    """What can be moved in a plan with explicit ranges, in execution order.

    A range has one coordinate, or one for each end with `both_ends` where it is asymmetric and spans zero. Grids that
    a concatenation shares with the layers before it move together. Softmax keeps its grid of powers of two, and a
    weight with one element a channel is exact already.
    """
    owner = _shared_grids(graph, plan)
    found: list[Coordinate] = []
    members: dict[Slot, list[Slot]] = {}
    order: list[tuple[Slot, LayerPlan]] = []
    for node, module in layers(graph):
        name = name_of(node)
        layer = plan.layers[name]
        for slot in slots(name, layer):
            if not _movable(layer, slot, module):
                continue
            first = owner.get(slot, slot)
            if first not in members:
                order.append((slot, layer))
            members.setdefault(first, []).append(slot)
    groups = list(members.values())
    for (slot, layer), group in zip(order, groups, strict=True):
        grid = grid_of(layer, slot)
        ends = ("min", "max") if both_ends and _spans_zero(grid) else ("both",)
        found += [Coordinate(tuple(group), end) for end in ends]
    return found


def _movable(layer: LayerPlan, slot: Slot, module: nn.Module) -> bool:
    grid = grid_of(layer, slot)
    if slot[1] == WEIGHT:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return grid.min is not None and weight[0].numel() > 1
    return not KINDS[layer.kind].fixed_grid and grid.min != grid.max


def _spans_zero(grid: TensorPlan | WeightPlan) -> bool:
    asymmetric = isinstance(grid, TensorPlan) and not grid.spec.symmetric
    return asymmetric and grid.min is not None and grid.max is not None and grid.min < 0 < grid.max  # type: ignore[operator]


def _shared_grids(graph: Graph, plan: Plan) -> dict[Slot, Slot]:
    """Output slots of layers whose grid is that of the concatenation after them, and of that one -> one slot."""
    owner: dict[Slot, Slot] = {}
    for node, _ in layers(graph):
        layer = plan.layers[name_of(node)]
        if not KINDS[layer.kind].shares_grid or layer.output is None:
            continue
        own = (name_of(node), OUTPUT)
        for source in layer_inputs(node):
            producer = producer_of(graph, source)
            if is_layer(graph, producer) and plan.layers[name_of(producer)].output == layer.output:
                before = (name_of(producer), OUTPUT)
                root = owner.get(before, before)  # a concatenation of concatenations
                owner |= {slot: own for slot, other in owner.items() if other == root}
                owner[before] = own
    return owner


def ends_of(coordinates: Sequence[Coordinate], values: NDArray[np.float64]) -> Mapping[Slot, tuple[float, float]]:
    """For each slot the factors of the lower and the upper end."""
    found: dict[Slot, tuple[float, float]] = {}
    for coordinate, value in zip(coordinates, values, strict=True):
        by = factor(float(value))
        for slot in coordinate.slots:
            low, high = found.get(slot, (1.0, 1.0))
            found[slot] = (low if coordinate.end == "max" else by, high if coordinate.end == "min" else by)
    return found


def scaled_plan(plan: Plan, coordinates: Sequence[Coordinate], values: NDArray[np.float64]) -> Plan:
    """The plan with its ranges scaled by the values of the coordinates."""
    changed = dict(plan.layers)
    for (name, index), (low, high) in ends_of(coordinates, values).items():
        layer = changed[name]
        if index == WEIGHT and layer.weight is not None:
            changed[name] = replace(layer, weight=scaled(layer.weight, low, high))
        elif index == OUTPUT and layer.output is not None:
            changed[name] = replace(layer, output=scaled(layer.output, low, high))
        else:
            inputs = [
                scaled(grid, low, high) if i == index and grid is not None else grid
                for i, grid in enumerate(layer.inputs)
            ]
            changed[name] = replace(layer, inputs=tuple(inputs))
    return replace(plan, layers=changed)
