"""A graph of a model that is a captured graph already, as thinned models are."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from qlib.graph.formulas import settle
from qlib.graph.identities import drop_dropouts
from qlib.graph.ir import Graph

__all__ = ["deployed_copy", "is_captured", "recapture"]


def is_captured(model: nn.Module) -> TypeGuard[Graph]:
    """Whether a model is a graph that `capture` made."""
    return isinstance(model, fx.GraphModule) and all("name" in node.meta for node in model.graph.nodes)


def recapture(graph: Graph, example: Tensor, *, share: bool) -> Graph:
    """What `capture` gives of the model that a graph was captured from, with the names, and tensors, of the graph.

    A graph to deploy has neither dropout nor formulas; with `share` both stay, if the graph was captured so.
    """
    tensors = itertools.chain(graph.parameters(), graph.buffers())
    found = copy.deepcopy(graph, {id(each): each for each in tensors}) if share else deployed_copy(graph)
    found.eval()
    with torch.no_grad():
        _Shapes(found).run(example)
    return found


def deployed_copy(graph: Graph) -> Graph:
    """A copy of a graph that trains, as it would be deployed: without dropout, and with constants for formulas."""
    graph = copy.deepcopy(graph)
    drop_dropouts(graph)
    settle(graph)
    return graph


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shapes."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor) and n.op != "output":
            n.meta["shape"] = tuple(found.shape)
        return found
