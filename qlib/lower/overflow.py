"""Accumulators that fit int32: weight scales that are too small for their layer's bias are raised.

Real networks have dead channels. After folding, weights of 1e-11 stand beside a bias of 0.1, and ``b / (s_x * s_w)`` is
no int32: simulation and kernel would overflow in different ways.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.lower.accumulator import accumulator_bounds
from qlib.lower.exact import lower_exact
from qlib.lower.ops.weighted import ExactWeighted
from qlib.quant.affine import QParams
from qlib.quant.plan import Plan

__all__ = ["ROOM", "fit_int32"]

ROOM = 2.0**30
"""Bias and worst accumulator of a layer together stay within half of what int32 holds."""


@torch.no_grad()
def fit_int32(graph: Graph, plan: Plan) -> tuple[Plan, dict[str, int]]:
    """The plan with larger weight scales where int32 would not hold bias or accumulator, and layer -> channels raised.

    A scale ``s_w`` becomes ``2^k * s_w``, with the least k for which ``|b| / (s_x * s_w) + bound / 2^k`` stays within
    `ROOM`; `bound` is the largest accumulator without the bias. It counts where the kernel adds in int32: with weights
    and activations of up to 8 bits. A plan that fits is returned as it is; so is a dynamic one, whose bias is float.
    """
    if plan.dynamic:
        return plan, {}
    raised: dict[str, int] = {}
    exact = lower_exact(graph, plan)
    modules = {name_of(node): module for node, module in layers(graph)}
    changed = dict(plan.layers)
    for name, module in modules.items():
        lowered = _submodule(exact, name)
        weight = changed[name].weight if name in changed else None
        if not isinstance(lowered, ExactWeighted) or weight is None or changed[name].bits_accum < 32:
            continue
        bias = module.bias if isinstance(module.bias, Tensor) else None
        factor = _factor(lowered, bias)
        if bool((factor > 1).any()):
            params = lowered.weight_params
            grid = QParams(params.scale * factor.to(params.scale.dtype), params.zero_point, params.spec)
            raised[name] = int((factor > 1).sum())
            more = replace(weight.on_grid(grid), raised=max(weight.raised, raised[name]))
            changed[name] = replace(changed[name], weight=more)
    if not raised:
        return plan, {}
    return replace(plan, layers=changed), raised


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _factor(layer: ExactWeighted, bias: Tensor | None) -> Tensor:
    """The power of two by which each scale of the weight is to be raised; 1 where it fits."""
    scale = layer.source.scale.double() * layer.weight_scale.double()
    total = torch.zeros_like(scale).expand(layer.weight_codes.shape[0])
    if bias is not None:
        total = total + bias.double().abs() / scale
    if layer.limit < float("inf"):
        total = total + accumulator_bounds(layer.centered_weight(), None, layer.source, by_channel=False)[0]
    total = total if scale.ndim else total.max()
    return torch.exp2(torch.log2(total / ROOM).ceil().clamp_(min=0))
