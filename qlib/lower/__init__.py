"""Plan + graph -> a model that computes in integers."""

from torch import fx

from qlib.graph import Graph
from qlib.lower.dynamic import lower_dynamic
from qlib.lower.exact import lower_exact
from qlib.quant.plan import Plan

__all__ = ["lower", "lower_dynamic", "lower_exact"]


def lower(graph: Graph, plan: Plan) -> fx.GraphModule:
    """The integer model of a plan, static or dynamic."""
    return lower_dynamic(graph, plan) if plan.dynamic else lower_exact(graph, plan)
