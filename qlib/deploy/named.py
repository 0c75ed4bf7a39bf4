"""A graph in which every tensor is what a module of its name returns, so that the exporter can name it so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qlib.graph import Graph
from qlib.graph.ir import layer_inputs, name_of

__all__ = ["is_named", "with_named_tensors"]

_NO_OPERATOR = frozenset({"contiguous", "clone", "detach"})
"""Moves that leave no trace in an ONNX file."""


class _Call(nn.Module):
    """Calls a function, or a method of its first argument."""

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


def is_named(node: fx.Node) -> bool:
    """Whether the result of a call has the name of its node in an ONNX file: that of a module, or of a move."""
    if node.op == "call_module":
        return "shape" in node.meta
    if node.op not in ("call_function", "call_method") or getattr(node.target, "__name__", node.target) in _NO_OPERATOR:
        return False
    return "shape" in node.meta and all("shape" in source.meta for source in layer_inputs(node))


def with_named_tensors(graph: Graph) -> Graph:
    """`graph` computing the same with the same weights, each call under the name of its node.

    A module that is called twice becomes two modules with one set of weights; functions and methods that move a
    tensor become modules. What does not compute a tensor from a tensor (sizes, tuples) stays as it is.
    """
    named = fx.GraphModule(graph, graph.graph)  # copies the graph, not the modules
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        values[node] = copied = new.node_copy(node, lambda old: values[old])
        if is_named(node) and (name_of(node) == node.target or _is_free(named, name_of(node))):
            named.add_submodule(name_of(node), _module_of(graph, node))
            copied.op, copied.target = "call_module", name_of(node)
    named.graph = new
    return named.eval()


def _module_of(graph: Graph, node: fx.Node) -> nn.Module:
    if node.op != "call_module":
        return _Call(node.target)
    module = graph.get_submodule(str(node.target))
    # A shallow copy shares the weights; of one module under two names, torch.export knows the first name only.
    return module if name_of(node) == node.target else copy.copy(module)


def _is_free(graph: Graph, name: str) -> bool:
    """Whether nothing in the graph has this name."""
    parent, _, last = name.rpartition(".")
    try:
        return not hasattr(graph.get_submodule(parent), last)
    except AttributeError:  # a module without state is not in the graph
        return True
