"""The parts of a graph that are reconstructed one after the other: single layers, or blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qlib.graph import Graph, fused_activations
from qlib.graph.walk import kind_of_node

__all__ = ["Unit", "block_units", "layer_units", "unit_module"]


@dataclass(frozen=True)
class Unit:
    """Nodes that stand next to each other in the graph: computed from `inputs`, and used through the last of them."""

    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The name of the last layer."""
        return str(self.output.meta["name"])

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes before the unit that it uses; constants are its own."""
        own = set(self.nodes)
        sources = [source for node in self.nodes for source in node.all_input_nodes]
        return tuple(dict.fromkeys(each for each in sources if each not in own and each.op != "get_attr"))


def block_units(graph: Graph) -> list[Unit]:
    """The graph cut wherever one tensor alone passes on: plain layers stand alone, a residual block stays together.

    Parts without weights go with the next one that has some; what comes after the last weight belongs to none.
    """
    order = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    position = {node: i for i, node in enumerate(order)}
    last = {node: max((position[user] for user in node.users if user in position), default=-1) for node in order}
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    image_end = max(position[user] for user in image.users)
    activations = {relu: producer for producer, relu in fused_activations(graph).items()}
    units: list[Unit] = []
    start, reach = 0, image_end
    for i, node in enumerate(order):
        alone = reach <= i  # nothing computed before this node is used after it
        reach = max(reach, last[node])
        before_its_relu = any(user in activations for user in node.users)
        if alone and not before_its_relu and _has_weight(graph, order[start : i + 1]):
            units.append(Unit(tuple(order[start : i + 1])))
            start = i + 1
    return units


def layer_units(graph: Graph) -> list[Unit]:
    """Each weighted layer, with the activation that its output's clamp computes."""
    fused = fused_activations(graph)
    nodes = [node for node in graph.graph.nodes if _has_weight(graph, [node])]
    return [Unit((node, fused[node]) if node in fused else (node,)) for node in nodes]


def _has_weight(graph: Graph, nodes: list[fx.Node]) -> bool:
    return any((kind := kind_of_node(graph, node)) is not None and kind.affine for node in nodes)


def unit_module(graph: fx.GraphModule, unit: Unit) -> fx.GraphModule:
    """The unit as a module of its own, of `unit.inputs`; it shares the layers of `graph`, by the nodes' names."""
    nodes = {node.name: node for node in graph.graph.nodes}
    new = fx.Graph()
    values = {nodes[source.name]: new.placeholder(source.name) for source in unit.inputs}
    for node in (nodes[each.name] for each in unit.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                values[source] = new.node_copy(source)
        values[node] = new.node_copy(node, lambda old: values[old])
    new.output(values[nodes[unit.output.name]])
    return fx.GraphModule(graph, new)
