"""What bits are chosen for: groups of weights and of activations, and what each choice costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from qlib.graph import Graph
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.walk import producer_of
from qlib.quant.plan import LayerPlan, Plan
from qlib.search.allocate import Costs
from qlib.search.sensitivity import ACTIVATIONS, WEIGHTS, Sensitivity

__all__ = ["Group", "bit_operations", "errors_of", "groups_of", "weight_bits", "weight_count"]

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Group:
    """Layers that get the same bits, for their weights or activations, of `options`: one option is no choice.

    A layer that is used twice is there under two names, and has one weight.
    """

    layers: tuple[str, ...]
    what: str
    options: tuple[int, ...]


def _weight(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if layer_kind(module).weighted and isinstance(weight, Tensor) else 0


def _modules(graph: Graph) -> dict[str, list[tuple[fx.Node, nn.Module]]]:
    """Module -> the layers that use it."""
    found: dict[str, list[tuple[fx.Node, nn.Module]]] = {}
    for node, module in layers(graph):
        found.setdefault(str(node.target), []).append((node, module))
    return found


def weight_count(graph: Graph) -> int:
    """The elements of all weights; those of a layer that is used twice count once."""
    return sum(_weight(uses[0][1]) for uses in _modules(graph).values())


def groups_of(
    graph: Graph, plan: Plan, choices: Sequence[int], pinned: set[tuple[str, str]], activations: bool
) -> list[Group]:
    """The groups of a plan: weights, then activations if they are to be chosen; all float weights are left out.

    `pinned` holds (layer, what) that keep the bits of the plan.
    """

    def group(names: tuple[str, ...], what: str, own: int) -> Group:
        keep = any((name, what) in pinned for name in names)
        return Group(names, what, (own,) if keep else tuple(choices))

    found = []
    for uses in _modules(graph).values():
        names = tuple(name_of(node) for node, _ in uses)
        weight = plan.layers[names[0]].weight
        if weight is not None:
            found.append(group(names, WEIGHTS, weight.spec.bits))
    for name, layer in plan.layers.items():
        bits = _own_bits(layer)
        if activations and bits is not None:
            found.append(group((name,), ACTIVATIONS, bits))
    return found


def _own_bits(layer: LayerPlan) -> int | None:
    """The bits of the activations that the layer's own settings rule."""
    grids = [grid for grid in (layer.output, *layer.inputs) if grid is not None]
    return grids[0].spec.bits if grids else None


def errors_of(groups: Sequence[Group], rows: Sequence[Sensitivity], relative: bool = False) -> list[list[float]]:
    """For each group and option the divergence it causes alone, or the `relative` squared error of the logits."""
    table = {
        (row.layer, row.what, row.bits): 10 ** (-row.sqnr_logits / 10) if relative else max(row.divergence, 0.0)
        for row in rows
    }
    return [
        [sum(table.get((name, group.what, bits), 0.0) for name in group.layers) for bits in group.options]
        for group in groups
    ]


def weight_bits(graph: Graph, groups: Sequence[Group]) -> tuple[Costs, int]:
    """The bits of all weights: the costs of the groups, and the fixed part, of weights in float."""
    sizes = {name_of(uses[0][0]): _weight(uses[0][1]) for uses in _modules(graph).values()}
    single = [
        [bits * sizes[group.layers[0]] if group.what == WEIGHTS else 0 for bits in group.options] for group in groups
    ]
    chosen = {group.layers[0] for group in groups if group.what == WEIGHTS}
    return Costs(single), sum(_FLOAT_BITS * size for name, size in sizes.items() if name not in chosen)


def bit_operations(
    graph: Graph, plan: Plan, groups: Sequence[Group], macs: Mapping[str, int | None]
) -> tuple[Costs, int]:
    """Bit operations: multiply-accumulates times the bits of both operands, 32 where one is in float.

    The bits of an operand are those of the group that rounds it: the layer itself, or the one that produces it.
    """
    where = {(name, group.what): index for index, group in enumerate(groups) for name in group.layers}
    single = [[0] * len(group.options) for group in groups]
    pairs: dict[tuple[int, int], list[list[int]]] = {}
    fixed = 0
    for node, module in layers(graph):
        name = name_of(node)
        count = macs.get(name)
        if not count:
            continue
        operands = [where.get((_rounder(graph, node, i, plan), ACTIVATIONS)) for i in range(len(layer_inputs(node)))]
        if layer_kind(module).weighted:
            operands = [where.get((name, WEIGHTS)), operands[0]]
        first, second = sorted(operands[:2], key=lambda index: -1 if index is None else index)
        if second is None:
            fixed += count * _FLOAT_BITS**2
        elif first is None:
            single[second] = _plus(single[second], [count * _FLOAT_BITS * b for b in groups[second].options])
        elif first == second:
            single[second] = _plus(single[second], [count * b * b for b in groups[second].options])
        else:
            table = pairs.setdefault(
                (first, second), [[0] * len(groups[second].options) for _ in groups[first].options]
            )
            for row, bits in zip(table, groups[first].options, strict=True):
                row[:] = _plus(row, [count * bits * other for other in groups[second].options])
    return Costs(single, pairs), fixed


def _plus(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _rounder(graph: Graph, node: fx.Node, index: int, plan: Plan) -> str:
    """The layer whose settings round input `index`: the layer itself, or that which produces it; else empty."""
    grids = plan.layers[name_of(node)].inputs
    if index < len(grids) and grids[index] is not None:
        return name_of(node)
    source = producer_of(graph, layer_inputs(node)[index])
    layer = plan.layers.get(name_of(source)) if source.op == "call_module" else None
    return name_of(source) if layer is not None and layer.output is not None else ""
