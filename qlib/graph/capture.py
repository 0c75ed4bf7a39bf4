"""Model -> graph: exported, taken apart into ops that have integer forms, each of them a module with a name."""

from __future__ import annotations

from torch import Tensor, nn

from qlib.graph.algebra import join_factors, join_masks
from qlib.graph.ir import Graph
from qlib.graph.recapture import is_captured, recapture
from qlib.graph.refusals import refuse_values
from qlib.graph.rewrite import rewrite
from qlib.graph.simplify import simplify
from qlib.graph.trace import trace

__all__ = ["capture"]


def capture(model: nn.Module, example: Tensor, *, share: bool = False) -> Graph:
    """The graph of `model` in evaluation mode, on copies of its weights: the model itself stays as it is.

    With `share` the graph is one to train: its weights and batch-norm statistics are those of the model, or lie in the
    same memory, and dropout stays in it.

    `example` is one batch ``[N, ...]`` of the size that the graph will see; its values do not matter. Every node has
    ``meta["name"]`` (the path of its layer, or of the module that runs it and the name of the op), ``meta["tensor"]``
    and, for tensors, ``meta["shape"]``. Dropout and other identities are gone; what does not depend on the input is
    computed once and kept as a constant.

    A model that is such a graph already, as a thinned one is, gives a copy with its names.

    Raises ModelError, naming the place, where the model cannot be exported.
    """
    if is_captured(model):
        return recapture(model, example, share=share)
    program = simplify(trace(model, example), dropouts=share)
    refuse_values(program.graph.graph, program.images)
    graph = rewrite(program, model, len(example), share=share)
    join_factors(graph)
    join_masks(graph)
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph
