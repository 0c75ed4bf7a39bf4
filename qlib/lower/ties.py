"""Functions of one value without codes halfway between two: ONNX Runtime computes them with approximations of its own.

They are right to the last bits of float32, which decide where a value is a tie of rounding: of 5,120,000 entries of
random tables of the sigmoid 26 differed from torch's, all of them within 2.5e-5 of a tie. So there must be none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qlib.graph import Graph
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.kinds import ELEMENTWISE
from qlib.graph.walk import producer_of
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["without_ties"]

_NEAR = 1e-4
"""In codes: nearer to a tie than this, rounding is not certain."""

_STEP = 1e-5
"""Relative: by how much a scale changes from one try to the next."""

_TRIES = 1000


@torch.no_grad()
def without_ties(graph: Graph, plan: Plan) -> Plan:
    """The plan with the output scales of sigmoids and their like changed by some 1e-5, where a code would be a tie.

    Scales of a power of two stay, and so do layers with more than 8 bits, or another float than float32.
    """
    if plan.dynamic:
        return plan
    changed = dict(plan.layers)
    for node, module in layers(graph):
        layer = changed.get(name_of(node))
        if not isinstance(module, ELEMENTWISE) or layer is None or layer.output is None or layer.float_bits:
            continue
        own, producer = layer.inputs[0], changed.get(name_of(producer_of(graph, layer_inputs(node)[0])))
        source = own or (producer.output if producer is not None else None)
        if source is None or layer.output.spec.pow2 or max(source.spec.bits, layer.output.spec.bits) > 8:
            continue
        changed[name_of(node)] = _without(module, layer, source, layer.output)
    return replace(plan, layers=changed) if changed != plan.layers else plan


def _without(module: nn.Module, layer: LayerPlan, source: TensorPlan, output: TensorPlan) -> LayerPlan:
    """The layer with the nearest scale that leaves no tie; as it was where none of those tried does."""
    assert output.min is not None
    assert output.max is not None
    for step in range(_TRIES):
        factor = 1 + (step // 2 + step % 2) * (-1) ** step * _STEP  # 0, -1, 1, -2, 2, ... steps
        tried = replace(output, min=output.min * factor, max=output.max * factor) if step else output
        if _distance(module, source, tried) >= _NEAR:
            return replace(layer, output=tried)
    return layer


def _distance(module: nn.Module, source: TensorPlan, output: TensorPlan) -> float:
    """How near the value of a code is to a tie, in codes of the output: at most 0.5."""
    given, made = source.qparams(), output.qparams()
    codes = torch.arange(given.spec.qmin, given.spec.qmax + 1)
    values = module((codes - given.zero_point) * given.scale).double() / made.scale.double()
    values = values.clamp(float(made.low), float(made.high))
    return float((values - values.floor() - 0.5).abs().min())
