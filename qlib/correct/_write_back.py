"""From a fake model whose weights and steps were changed to the float graph and plan that give the same integers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from qlib.graph import Graph
from qlib.graph.ir import name_of
from qlib.lower.fake import FakeLayer, FakeQuantize, FakeWeight
from qlib.quant.affine import QParams, range_of_grid
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["write_back"]


@torch.no_grad()
def write_back(graph: Graph, fake: fx.GraphModule, plan: Plan) -> Plan:
    """Copies the weights of `fake` (made of `graph` and `plan`) into `graph`; answers the plan with its grids.

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
    inputs = tuple(
        _on_grid(planned, grid.params) if planned is not None and isinstance(grid, FakeQuantize) else planned
        for planned, grid in zip(plan.inputs, layer.inputs, strict=True)
    )
    weight, output = plan.weight, plan.output
    if weight is not None and isinstance(layer.weight, FakeWeight):
        low, high = range_of_grid(layer.weight.params)
        weight = replace(weight, min=_numbers(low), max=_numbers(high))
    if output is not None and layer.output is not None:
        output = _on_grid(output, layer.output.params)
    return replace(plan, inputs=inputs, weight=weight, output=output)


def _on_grid(plan: TensorPlan, params: QParams) -> TensorPlan:
    low, high = range_of_grid(params)
    return replace(plan, min=float(low), max=float(high))


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.reshape(-1).tolist())
