"""Pairs of weighted layers between which nothing mixes channels: a factor can move from one to the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.graph import Graph
from qlib.graph.channels import input_origins
from qlib.graph.ir import is_move, layers, name_of, tensor_users
from qlib.graph.kinds import layer_kind
from qlib.graph.walk import kind_of_node

__all__ = ["Pair", "find_pairs", "passes", "shared_layers", "single_layers"]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers; all that `first` computes goes, through the nodes `between`, to `second` alone.

    `channels[j]` is the output channel of `first` that input channel j of `second` holds, -1 for none; `padded`: zeros
    are put beside its values on the way; `activated`: a ReLU or ReLU6 is on the way.
    """

    first: fx.Node
    second: fx.Node
    between: tuple[fx.Node, ...]
    channels: Tensor
    padded: bool
    activated: bool

    def __str__(self) -> str:
        return f"{name_of(self.first)} -> {name_of(self.second)}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of all nodes whose values the factor changes."""
        return (name_of(self.first), *map(name_of, self.between))

    def relu6(self, graph: Graph) -> bool:
        """Whether a ReLU6 lies between."""
        modules = (graph.get_submodule(str(node.target)) for node in self.between if node.op == "call_module")
        return any(isinstance(module, nn.ReLU6) for module in modules)

    def per_input(self, values: Tensor, default: float) -> Tensor:
        """`values` of the output channels of `first`, for each input channel of `second`."""
        channels = self.channels.to(values.device)
        return torch.where(channels >= 0, values[channels.clamp(min=0)], default)


def find_pairs(graph: Graph) -> list[Pair]:
    """All pairs, in execution order."""
    origins, single = input_origins(graph), single_layers(graph)
    pairs = []
    for first in single:
        between: list[fx.Node] = []
        last = first
        while len(users := tensor_users(last)) == 1 and passes(graph, users[0]):
            last = users[0]
            between.append(last)
        if len(users) == 1 and users[0] in single and users[0] in origins:
            origin = origins[users[0]]
            kinds = (kind_of_node(graph, node) for node in between)
            activated = any(kind is not None and kind.is_relu for kind in kinds)
            pairs.append(Pair(first, users[0], tuple(between), origin.channels, origin.padded, activated))
    return pairs


def shared_layers(graph: Graph) -> list[fx.Node]:
    """The weighted layers that are called more than once, or whose weights others use too: no call can be corrected."""
    single = set(single_layers(graph))
    return [node for node in _weighted(graph) if node not in single]


def single_layers(graph: Graph) -> list[fx.Node]:
    """The weighted layers that are called once, with weights that are theirs alone."""
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    weighted = _weighted(graph)
    owners = Counter(id(graph.get_submodule(target).weight) for target in {str(node.target) for node in weighted})
    return [
        node
        for node in weighted
        if calls[str(node.target)] == 1 and owners[id(graph.get_submodule(str(node.target)).weight)] == 1
    ]


def _weighted(graph: Graph) -> list[fx.Node]:
    return [node for node, module in layers(graph) if layer_kind(module).affine]


def passes(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is a move, pool or ReLU: a positive factor of a channel goes through it unchanged."""
    kind = kind_of_node(graph, node)
    return is_move(graph, node) if kind is None else kind.pools or kind.is_relu
