"""The arithmetic of each layer of a plan: integers, or float and why.

Lowerings and reports both ask `float_reason`: what a run prints is what it lowers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from qlib.graph import Graph
from qlib.graph.ir import is_layer, layer_inputs, name_of
from qlib.graph.kinds import kind_of, layer_kind
from qlib.graph.walk import keeps_grid
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["NOT_DYNAMIC", "dynamic_float_reason", "float_reason", "float_reasons", "with_notes"]

Bits = Sequence[int | None]
"""Of the grids of tensors; None for float."""

NOT_DYNAMIC = "dynamic: only weighted layers and matmul are quantized"


def float_reason(module: nn.Module, plan: LayerPlan, inputs: Bits, output: int | None) -> str:
    """Why a layer of a static plan computes in float; empty where it computes in integers.

    >>> float_reason(nn.Linear(2, 2), LayerPlan("linear", float_bits=16), (8,), None)
    'runs in float16'
    """
    kind = layer_kind(module)
    if plan.float_bits is not None and not kind.keeps_grid:
        return f"runs in float{plan.float_bits}"
    return kind.float_reason(module, inputs, output, quantized_weight=plan.weight is not None)


def dynamic_float_reason(module: nn.Module, plan: LayerPlan) -> str:
    """As `float_reason`, in a dynamic plan: a layer quantizes its own inputs, and its accumulator leaves as float."""
    kind, inputs = layer_kind(module), [_bits(grid) for grid in plan.inputs]
    if kind.accumulates:
        return float_reason(module, plan, inputs, max((bits or 0 for bits in inputs), default=0))
    if kind.weighted or kind.keeps_grid:
        return float_reason(module, plan, inputs, None)
    return NOT_DYNAMIC


def float_reasons(graph: Graph, plan: Plan) -> dict[str, str]:
    """Layer name -> why it computes in float, in the plan's words where it has some; empty for integers."""
    reasons: dict[str, str] = {}
    leaving: dict[fx.Node, int | None] = {}
    for node in graph.graph.nodes:
        sources = layer_inputs(node) if node.op not in ("placeholder", "get_attr") else []
        arriving = [leaving[source] for source in sources]
        if is_layer(graph, node):
            module, name = graph.get_submodule(str(node.target)), name_of(node)
            layer = plan.layers.get(name, LayerPlan(kind_of(module)))
            planned = (*layer.inputs, *[None] * len(arriving))
            arriving = [_bits(grid) or before for grid, before in zip(planned, arriving, strict=False)]
            leaving[node] = _bits(layer.output)
            reason = dynamic_float_reason(module, layer) if plan.dynamic else ""
            if not plan.dynamic:
                reason = float_reason(module, layer, arriving, leaving[node])
            reasons[name] = reason and (layer.note or reason)
        if node.op != "output":
            leaving[node] = arriving[0] if keeps_grid(graph, node) else leaving.get(node)
    return reasons


def with_notes(graph: Graph, plan: Plan) -> Plan:
    """The plan with a note of each layer that computes in float, and none of others; notes that stand are kept."""
    reasons = float_reasons(graph, plan)
    return replace(plan, layers={name: replace(each, note=reasons[name]) for name, each in plan.layers.items()})


def _bits(grid: TensorPlan | None) -> int | None:
    return None if grid is None else grid.spec.bits
