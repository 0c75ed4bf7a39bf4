"""How to read a captured graph: names, layers, and where a tensor's values come from.

A `Graph` is a torch.fx GraphModule in which every node that changes values calls a module; the other nodes move
values (view, transpose, chunk, ...), read constants, or compute shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qlib.graph.kinds import layer_kind

__all__ = [
    "Graph",
    "attribute",
    "is_constant",
    "is_layer",
    "is_move",
    "layer_inputs",
    "layers",
    "name_of",
    "parameters_of",
    "source_line",
    "source_of",
    "tensor_users",
]

Graph = fx.GraphModule


def name_of(node: fx.Node) -> str:
    """The node's stable hierarchical name, such as ``layer1.0.conv1``."""
    return str(node.meta["name"])


def source_line(node: fx.Node) -> str:
    """Where the model's own code calls the node, as ``model.py:12``; empty where that is not known."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = re.findall(r'File "(.+)", line (\d+), in ', node.stack_trace or "")
    return next((f"{file}:{line}" for file, line in reversed(frames) if not file.startswith(ours)), "")


def is_constant(node: fx.Node) -> bool:
    """A tensor that does not depend on the images: one that the model holds, or in training computes from such."""
    reads = node.op == "get_attr" or (node.op == "call_module" and not node.all_input_nodes)
    return reads and bool(node.meta["tensor"])


def attribute(graph: Graph, node: fx.Node) -> torch.Tensor:
    """The value of a constant."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    value = value() if node.op == "call_module" else value
    assert isinstance(value, torch.Tensor)
    return value


def is_layer(graph: Graph, node: fx.Node) -> bool:
    """Whether the node changes values."""
    return node.op == "call_module" and not layer_kind(graph.get_submodule(str(node.target))).moves


def is_move(graph: Graph, node: fx.Node) -> bool:
    """Whether the node's output holds the values of its first tensor input, moved."""
    passes = node.op not in ("placeholder", "output") and not is_constant(node) and not is_layer(graph, node)
    return bool(node.meta["tensor"]) and passes


def layers(graph: Graph) -> Iterator[tuple[fx.Node, nn.Module]]:
    """The nodes that change values, in execution order, with their modules."""
    for node in graph.graph.nodes:
        if is_layer(graph, node):
            yield node, graph.get_submodule(str(node.target))


def parameters_of(graph: Graph) -> list[nn.Parameter]:
    """The parameters that the graph computes with, each once."""
    found: dict[nn.Parameter, None] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            found |= dict.fromkeys(graph.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr" and isinstance(value := attribute(graph, node), nn.Parameter):
            found[value] = None
    return list(found)


def layer_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor inputs of a node, in order; shapes and other plain values are left out."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if arg.meta["tensor"]:
            found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), visit)
    return found


def source_of(graph: Graph, node: fx.Node) -> fx.Node:
    """The layer, input or constant whose values `node` holds, looking back through moves."""
    while is_move(graph, node):
        node = layer_inputs(node)[0]
    return node


def tensor_users(node: fx.Node) -> list[fx.Node]:
    """The nodes that use the values of `node`; not those that only ask for its shape."""
    return [user for user in node.users if user.op == "output" or user.meta["tensor"]]


def holds_tensor(value: Any) -> bool:
    """Whether a value is a float tensor, or a tuple or list of such.

    >>> holds_tensor(torch.zeros(2)), holds_tensor((2, 3))
    (True, False)
    """
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return bool(value) and all(isinstance(item, torch.Tensor) for item in value)
    return isinstance(value, torch.Tensor)
