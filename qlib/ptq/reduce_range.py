"""Weights of 7 bits where the products of 8 bits would saturate (see `lower.saturation`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from qlib.quant.plan import LayerPlan, Plan

__all__ = ["reduce_range"]


def reduce_range(plan: Plan, names: Collection[str]) -> Plan:
    """The plan with weights of 7 bits instead of 8 in the layers `names`, all of which must be layers of it.

    Two products of such weights stay within 16 bits: ``2 * 255 * -64 = -32640``. Layers whose weight is float, has
    other bits or is unsigned (asym_u: the kernel that saturates takes signed weights) stay as they are.

    >>> from qlib.quant.plan import WeightPlan
    >>> from qlib.quant.spec import QuantSpec
    >>> plan = Plan({"conv": LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 8)))})
    >>> reduce_range(plan, ["conv"]).layers["conv"].weight.spec.bits
    7
    """
    unknown = set(names) - set(plan.layers)
    assert not unknown, unknown
    return replace(
        plan, layers={name: _reduced(layer) if name in names else layer for name, layer in plan.layers.items()}
    )


def _reduced(layer: LayerPlan) -> LayerPlan:
    weight = layer.weight
    if weight is None or weight.spec.bits != 8 or not weight.spec.signed:
        return layer
    return replace(layer, weight=replace(weight, spec=replace(weight.spec, bits=7)))
