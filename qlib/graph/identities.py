"""Dropout, which does nothing in evaluation."""

from __future__ import annotations

from qlib.graph.ir import Graph, layer_inputs
from qlib.graph.kinds import DROPOUTS

__all__ = ["drop_dropouts"]


def drop_dropouts(graph: Graph) -> None:
    """Erases, in place, the dropouts of a graph that was captured to train.

    >>> import torch
    >>> from torch import nn
    >>> from qlib.graph.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.zeros(2, 2), share=True)
    >>> drop_dropouts(graph)
    >>> [name for name, _ in graph.named_children()]
    ['0']
    """
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), DROPOUTS):
            node.replace_all_uses_with(layer_inputs(node)[0])
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
