"""Walks through a graph along what leaves values on their grid: moves, ReLUs, max pools."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from qlib.graph.ir import Graph, is_layer, is_move, layer_inputs, tensor_users
from qlib.graph.kinds import LayerKind, layer_kind

__all__ = ["keeps_grid", "kind_of_node", "producer_of", "readers_of", "sole_producer"]

Through = Callable[[Graph, fx.Node], bool]
"""Which nodes a walk goes through."""


def kind_of_node(graph: Graph, node: fx.Node) -> LayerKind | None:
    """The kind of the layer that a node computes; None for what is no layer."""
    return layer_kind(graph.get_submodule(str(node.target))) if is_layer(graph, node) else None


def keeps_grid(graph: Graph, node: fx.Node) -> bool:
    """Whether the output of a node is on the grid of its first input: a move, or a layer that keeps grids."""
    kind = kind_of_node(graph, node)
    return kind.keeps_grid if kind is not None else is_move(graph, node)


def producer_of(graph: Graph, node: fx.Node, through: Through = keeps_grid) -> fx.Node:
    """The node whose grid `node` is on: itself, or that before all that keeps grids.

    >>> import torch
    >>> from torch import nn
    >>> from qlib.graph import capture
    >>> model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    >>> graph = capture(model, torch.zeros(1, 1, 4, 4))
    >>> linear = next(node for node in graph.graph.nodes if node.meta["name"] == "4")
    >>> producer_of(graph, linear.args[0]).meta["name"]
    '0'
    """
    while through(graph, node):
        node = layer_inputs(node)[0]
    return node


def readers_of(graph: Graph, node: fx.Node, through: Through = keeps_grid) -> list[fx.Node]:
    """The nodes that the values of `node` reach, through what keeps grids; each once."""
    readers: dict[fx.Node, None] = {}
    for user in tensor_users(node):
        readers |= dict.fromkeys(readers_of(graph, user, through) if through(graph, user) else [user])
    return list(readers)


def sole_producer(graph: Graph, source: fx.Node, user: fx.Node) -> fx.Node | None:
    """The layer whose grid `source` is on, if all that it computes goes on one path to `user` alone."""
    node = source
    while tensor_users(node) == [user]:
        if not keeps_grid(graph, node):
            return node if is_layer(graph, node) else None
        node, user = layer_inputs(node)[0], node
    return None
