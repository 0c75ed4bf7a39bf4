"""Sigmoids without codes halfway between two: ONNX Runtime computes their tables with an approximation of its own.

It is right to the last bits of float32, which decide where a value is a tie of rounding: of 5,120,000 entries of random
tables 26 differed from torch's, all of them within 2.5e-5 of a tie. So there must be none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qlib.graph import Graph
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.walk import producer_of
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["without_ties"]

_NEAR = 1e-4
"""In codes: nearer to a tie than this, rounding is not certain."""

_STEP = 1e-5
"""Relative: by how much a scale changes from one try to the next; the first tries are enough."""


@torch.no_grad()
def without_ties(graph: Graph, plan: Plan) -> Plan:
    """The plan with the output scales of sigmoids changed by some 1e-5, where a code of theirs would be a tie.

    Scales of a power of two stay, and so does what has more than 8 bits: it has no table.
    """
    if plan.dynamic:
        return plan
    changed = dict(plan.layers)
    for node, module in layers(graph):
        layer = changed.get(name_of(node))
        if not isinstance(module, nn.Sigmoid) or layer is None or layer.output is None or layer.output.spec.pow2:
            continue
        own, producer = layer.inputs[0], changed.get(name_of(producer_of(graph, layer_inputs(node)[0])))
        source = own or (producer.output if producer is not None else None)
        if source is not None and max(source.spec.bits, layer.output.spec.bits) <= 8:
            changed[name_of(node)] = _without(layer, source, layer.output)
    return replace(plan, layers=changed) if changed != plan.layers else plan


def _without(layer: LayerPlan, source: TensorPlan, output: TensorPlan) -> LayerPlan:
    assert output.min is not None
    assert output.max is not None
    step = 0
    tried = output
    while _distance(source, tried) < _NEAR:
        step = -step if step > 0 else 1 - step  # 1, -1, 2, -2, ...
        factor = 1 + step * _STEP
        tried = replace(output, min=output.min * factor, max=output.max * factor)
    return replace(layer, output=tried)


def _distance(source: TensorPlan, output: TensorPlan) -> float:
    """How near a value of the table is to a tie, in codes: at most 0.5."""
    given, made = source.qparams(), output.qparams()
    codes = torch.arange(given.spec.qmin, given.spec.qmax + 1)
    values = torch.sigmoid((codes - given.zero_point) * given.scale).double() / made.scale.double()
    values = values.clamp(max=float(made.high))
    return float((values - values.floor() - 0.5).abs().min())
