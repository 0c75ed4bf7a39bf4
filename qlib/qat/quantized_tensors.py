"""Which tensors of a graph have the bits that a quantizer of a schedule gives activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph
from qlib.graph.ir import is_layer, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.ops import ChannelAffine
from qlib.graph.walk import keeps_grid, kind_of_node, producer_of, readers_of

__all__ = ["before_relu", "ends_in_relu", "later_relus", "on_inputs"]


def ends_in_relu(graph: Graph, node: fx.Node) -> bool:
    """Whether all that leaves a layer goes through a ReLU, behind nothing but moves and max pools."""
    readers = [kind_of_node(graph, reader) for reader in readers_of(graph, node, before_relu)]
    return bool(readers) and all(kind is not None and kind.is_relu for kind in readers)


def before_relu(graph: Graph, node: fx.Node) -> bool:
    """Whether a node moves or pools values, so that a ReLU may stand behind it as well as before it."""
    kind = kind_of_node(graph, node)
    return keeps_grid(graph, node) and (kind is None or not kind.is_relu)


def later_relus(graph: Graph) -> dict[str, str]:
    """ReLUs that no layer takes in -> the layer before them: a rule for the ReLU says what leaves that layer."""
    found = {}
    for node, module in layers(graph):
        source = producer_of(graph, node)
        if layer_kind(module).is_relu and is_layer(graph, source):
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
        bits = {wanted.get(name_of(reader), 0) for reader in readers_of(graph, node)}
        output = bits.pop() if len(bits) == 1 and all(bits) else wide
        if wanted.get(name):
            found[name] = replace(own, bits_activations=output, input_overrides={0: {"bits_activations": wanted[name]}})
        elif own.bits_activations and own.origin_of("bits_activations") == default:
            found[name] = replace(own, bits_activations=output)
    return found


def _weighs(module: nn.Module) -> bool:
    """Whether a layer multiplies its input with a matrix of weights; a batch-norm that stands alone scales it."""
    return layer_kind(module).affine and not isinstance(module, ChannelAffine)
