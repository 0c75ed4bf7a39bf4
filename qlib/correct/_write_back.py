"""From a fake model whose weights and scales were changed to the float graph and plan that give the same integers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from qlib.graph import Graph
from qlib.graph.ir import name_of
from qlib.lower.fake import FakeLayer, FakeQuantize, FakeWeight
from qlib.quant.plan import LayerPlan, Plan

__all__ = ["write_back"]


@torch.no_grad()
def write_back(graph: Graph, fake: fx.GraphModule, plan: Plan) -> Plan:
    """Copies the weights of `fake` (made of `graph` and `plan`) into `graph`; returns the plan with its grids.

    Weights get explicit ranges, as their own would be those of the rounded values.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    plans = dict(plan.layers)
    for node in fake.graph.nodes:
        layer = fake.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, FakeLayer):
            continue
        name, module = name_of(node), graph.get_submodule(str(nodes[node.name].target))
        for parameter, value in module.named_parameters():
            value.copy_(layer.module.get_parameter(parameter))
        plans[name] = _learned(plans[name], layer)
    return replace(plan, layers=plans)


def _learned(plan: LayerPlan, layer: FakeLayer) -> LayerPlan:
    """The plan of a layer with the grids that `layer` has."""
    inputs = [grid.params if isinstance(grid, FakeQuantize) else None for grid in layer.inputs]
    plan = plan.with_grids(inputs, layer.output.params if layer.output is not None else None)
    if plan.weight is None or not isinstance(layer.weight, FakeWeight):
        return plan
    return replace(plan, weight=plan.weight.on_grid(layer.weight.params))
