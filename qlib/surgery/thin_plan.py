"""The plan of a thinned model: that of the model before, without the scales of channels that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from qlib.graph.coordinates import ChannelClasses
from qlib.graph.coordinates_unions import varying
from qlib.graph.ir import Graph, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.weights import channel_axis
from qlib.quant.plan import Plan

__all__ = ["thin_plan"]


def thin_plan(plan: Plan, graph: Graph, classes: ChannelClasses, keep: Tensor) -> Plan:
    """The plan for `graph`, folded, without some of its classes; every grid that stays is the one that it was.

    Law: in integers the thinned graph computes with it, bit for bit, what the graph computes with `plan` and with zeros
    in the place of these classes.
    """
    found = dict(plan.layers)
    for node, module in layers(graph):
        layer, labels = found[name_of(node)], classes.values[node.name]
        weight = layer.weight
        if weight is None or not weight.per_channel or weight.min is None or weight.max is None:
            continue
        if not layer_kind(module).affine:  # the rows of a table stay
            continue
        assert isinstance(labels, Tensor)
        axis = channel_axis(module) % labels.ndim
        if axis in varying(labels):
            stay = keep[labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))]]
            low, high = (_kept(ends, stay) for ends in (weight.min, weight.max))
            found[name_of(node)] = replace(layer, weight=replace(weight, min=low, max=high))
    return replace(plan, layers=found)


def _kept(ends: Sequence[float], stay: Tensor) -> tuple[float, ...]:
    return tuple(end for end, stays in zip(ends, stay.tolist(), strict=True) if stays)
