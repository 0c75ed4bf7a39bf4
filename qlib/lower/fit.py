"""A plan whose integers every kernel computes alike: no table with ties, no accumulator beyond int32."""

from __future__ import annotations

from qlib.graph import Graph
from qlib.lower.overflow import fit_int32
from qlib.lower.ties import without_ties
from qlib.quant.plan import Plan

__all__ = ["fit"]


def fit(graph: Graph, plan: Plan) -> tuple[Plan, dict[str, int]]:
    """The plan with scales of sigmoids and weights changed where they must be, and layer -> channels raised.

    Law: what fits is returned as it is, so that ``fit(graph, fit(graph, plan)[0])[0] == fit(graph, plan)[0]``.
    """
    return fit_int32(graph, without_ties(graph, plan))
