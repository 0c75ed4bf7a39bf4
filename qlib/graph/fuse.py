"""Which ReLUs are part of the layer before them."""

from __future__ import annotations

from torch import fx, nn

from qlib.graph.ir import Graph, layer_inputs, tensor_users
from qlib.graph.kinds import layer_kind

__all__ = ["activation_bounds", "fused_activations"]


def fused_activations(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Producer -> the ReLU or ReLU6 that alone follows it: the clamp of the producer's output computes it for free."""
    fused = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or not layer_kind(graph.get_submodule(str(node.target))).is_relu:
            continue
        (source,) = layer_inputs(node)
        if (
            source.op == "call_module"
            and len(tensor_users(source)) == 1
            and layer_kind(graph.get_submodule(str(source.target))).fuses_relu
        ):
            fused[source] = node
    return fused


def activation_bounds(graph: Graph, activation: fx.Node) -> tuple[float, float]:
    """What a ReLU or ReLU6 clamps to."""
    relu6 = isinstance(graph.get_submodule(str(activation.target)), nn.ReLU6)
    return 0.0, 6.0 if relu6 else float("inf")
