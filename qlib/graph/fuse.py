"""Which ReLUs are part of the layer before them."""

from __future__ import annotations

from torch import fx

from qlib.graph.ir import Graph, kind_of, layer_inputs, tensor_users

__all__ = ["fused_activations"]

_PRODUCERS = frozenset({"conv", "conv_transpose", "linear", "matmul", "add", "mul", "concat", "avg_pool", "float_op"})


def fused_activations(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Producer -> the ReLU or ReLU6 that alone follows it: the clamp of the producer's output computes it for free."""
    fused = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or kind_of(graph.get_submodule(str(node.target))) != "relu":
            continue
        (source,) = layer_inputs(node)
        if (
            source.op == "call_module"
            and len(tensor_users(source)) == 1
            and kind_of(graph.get_submodule(str(source.target))) in _PRODUCERS
        ):
            fused[source] = node
    return fused
