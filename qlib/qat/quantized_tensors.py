"""Which tensors of a graph have the bits that a quantizer of a schedule gives activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph, kind_of
from qlib.graph.ir import layers, name_of, tensor_users
from qlib.graph.ops import ChannelAffine

__all__ = ["ends_in_relu", "later_relus", "on_inputs", "producer_of"]


def ends_in_relu(graph: Graph, node: fx.Node) -> bool:
    """Whether all that leaves a layer goes through a ReLU, behind nothing but moves and max pools."""
    users = tensor_users(node)
    return bool(users) and all(_is_relu_later(graph, user) for user in users)


def _is_relu_later(graph: Graph, node: fx.Node) -> bool:
    kind = kind_of(graph.get_submodule(str(node.target))) if node.op == "call_module" else "move"
    if kind == "relu":
        return True
    return node.op != "output" and kind in ("max_pool", "move") and ends_in_relu(graph, node)


def producer_of(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The layer that gives the first input of `node` its grid: behind moves, ReLUs and max pools."""
    source = next((each for each in node.all_input_nodes if each.meta["tensor"]), None)
    while source is not None and source.op != "placeholder":
        kind = kind_of(graph.get_submodule(str(source.target))) if source.op == "call_module" else "move"
        if kind not in ("relu", "max_pool", "move"):
            return source
        source = next((each for each in source.all_input_nodes if each.meta["tensor"]), None)
    return None


def later_relus(graph: Graph) -> dict[str, str]:
    """ReLUs that no layer takes in -> the layer before them: a rule for the ReLU says what leaves that layer."""
    found = {}
    for node, module in layers(graph):
        source = producer_of(graph, node) if kind_of(module) == "relu" else None
        if source is not None:
            found[name_of(node)] = name_of(source)
    return found


def on_inputs(graph: Graph, settings: Mapping[str, LayerSettings], wide: int, default: str) -> dict[str, LayerSettings]:
    """The settings under which the `bits_activations` of a layer with weights are those of its input.

    An output that only such layers read, all with the same bits, has these bits, every other one has `wide`, unless a
    rule speaks of it: `default` is where its bits come from if none does. A layer that wants other bits of what it
    reads puts it on a grid of its own.
    """
    wanted = {
        name_of(node): settings[name_of(node)].bits_activations for node, module in layers(graph) if _weighs(module)
    }
    found = dict(settings)
    for node, _ in layers(graph):
        name = name_of(node)
        own = settings[name]
        bits = {wanted.get(name_of(reader), 0) for reader in _readers(graph, node)}
        output = bits.pop() if len(bits) == 1 and all(bits) else wide
        if wanted.get(name):
            found[name] = replace(own, bits_activations=output, input_overrides={0: {"bits_activations": wanted[name]}})
        elif own.bits_activations and own.origin_of("bits_activations") == default:
            found[name] = replace(own, bits_activations=output)
    return found


def _weighs(module: nn.Module) -> bool:
    """Whether a layer multiplies its input with a matrix of weights; a batch-norm that stands alone scales it."""
    return kind_of(module) in ("conv", "conv_transpose", "linear") and not isinstance(module, ChannelAffine)


def _readers(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """What reads the output of a layer, behind moves, ReLUs and max pools."""
    for user in tensor_users(node):
        kind = kind_of(graph.get_submodule(str(user.target))) if user.op == "call_module" else "move"
        if user.op != "output" and kind in ("relu", "max_pool", "move"):
            yield from _readers(graph, user)
        else:
            yield user
