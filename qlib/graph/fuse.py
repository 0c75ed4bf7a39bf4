"""Which ReLUs are part of the layer before them."""

from __future__ import annotations

from torch import fx, nn

from qlib.graph.ir import Graph, kind_of, layer_inputs, tensor_users

__all__ = ["activation_bounds", "fused_activations"]

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


def activation_bounds(graph: Graph, activation: fx.Node) -> tuple[float, float]:
    """What a ReLU or ReLU6 clamps to."""
    relu6 = isinstance(graph.get_submodule(str(activation.target)), nn.ReLU6)
    return 0.0, 6.0 if relu6 else float("inf")
