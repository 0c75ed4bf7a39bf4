"""The layers of a plan as rows of plain data: their grids, costs, and what their ranges clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from qlib.graph import Graph, fused_activations, kind_of
from qlib.graph.cost import layer_macs
from qlib.graph.ir import layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.weights import swap_channels
from qlib.quant.affine import dequantize, quantize
from qlib.quant.arithmetic import float_reasons
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.report.record_parts import Bars, Layer
from qlib.search.noise import cumulated_sqnr
from qlib.search.sensitivity import sqnr
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import ModelStats

__all__ = ["bars", "clipped_share", "layer_rows"]

_BARS = 64
_CHANNELS = 64


def layer_rows(
    graph: Graph, plan: Plan | None, stats: ModelStats | None, images: Tensor | None = None
) -> tuple[Layer, ...]:
    """A row for each layer of a folded graph, in execution order; without a plan all is in float.

    On `images`, a batch, the noise of each output is measured, if the plan has fixed ranges.
    """
    noise: Mapping[str, float] = {}
    if images is not None and plan is not None and not plan.dynamic:
        noise = cumulated_sqnr(graph, plan, images)
    reasons = {} if plan is None else float_reasons(graph, plan)
    macs, seen = layer_macs(graph), _histograms(graph, stats)
    rows = (_row(node, module, plan, reasons, macs, seen) for node, module in layers(graph))
    return tuple(replace(row, sqnr=noise.get(row.name)) for row in rows)


def _row(
    node: fx.Node,
    module: nn.Module,
    plan: Plan | None,
    reasons: Mapping[str, str],
    macs: Mapping[str, int | None],
    seen: Mapping[str, Histogram],
) -> Layer:
    name = name_of(node)
    layer = plan.layers[name] if plan is not None else LayerPlan(kind_of(module))
    histogram = seen.get(name)
    row = Layer(
        name,
        kind_of(module),
        tuple(node.meta.get("shape", ()))[1:],
        macs[name],
        integer=plan is not None and not reasons[name],
        why_float=reasons.get(name, ""),
        histogram=None if histogram is None else bars(histogram),
    )
    weight = _weight_facts(module, layer.weight) if layer_kind(module).weighted else {}
    return Layer(**{**vars(row), **weight, **_output_facts(layer.output, histogram)})


def _histograms(graph: Graph, stats: ModelStats | None) -> dict[str, Histogram]:
    """Layer name -> the histogram of its output, behind an activation that it computes as well."""
    fused, found = {} if stats is None else fused_activations(graph), dict[str, Histogram]()
    for node, _ in layers(graph) if stats is not None else ():
        assert stats is not None
        record = stats.layers.get(name_of(fused.get(node, node)))
        if record is not None and record.output.histogram is not None:
            found[name_of(node)] = record.output.histogram
    return found


@torch.no_grad()
def _weight_facts(module: nn.Module, plan: WeightPlan | None) -> dict[str, object]:
    """Of a weight ``[out, ...]``: its grid, the noise that rounding adds, the magnitude of its channels."""
    weight = swap_channels(module, cast(Tensor, module.weight).detach())
    bias = getattr(module, "bias", None)
    biases = 4 * bias.numel() if isinstance(bias, Tensor) else 0
    largest = weight.flatten(1).abs().amax(1) if weight.ndim > 1 else weight.abs()
    facts: dict[str, object] = {
        "channels": _thinned(largest),
        "channel_count": len(largest),
        "dead": int((largest == 0).sum()),
        "float_bytes": 4 * weight.numel() + biases,
        "bytes": 4 * weight.numel() + biases,
    }
    if plan is not None:
        params = plan.qparams(weight)
        noise = dequantize(quantize(weight, params), params) - weight
        facts |= {
            "bytes": math.ceil(weight.numel() * plan.spec.bits / 8) + biases,
            "weight_bits": plan.spec.bits,
            "weight_mode": plan.spec.mode + " per channel" * plan.per_channel,
            "weight_scale": float(params.scale.min()),
            "weight_scale_max": float(params.scale.max()),
            "weight_raised": plan.raised,
            "weight_sqnr": sqnr(float(weight.square().sum()), float(noise.square().sum())),
        }
    return facts


def _thinned(values: Tensor) -> tuple[float, ...]:
    """The values, or the largest of each group of neighbours where there are many."""
    parts = torch.tensor_split(values, min(len(values), _CHANNELS))
    return tuple(float(f"{float(part.max()):.4g}") for part in parts)


def _output_facts(grid: TensorPlan | None, histogram: Histogram | None) -> dict[str, object]:
    if grid is None:
        return {}
    facts: dict[str, object] = {"bits": grid.spec.bits, "mode": grid.spec.mode, "clip": grid.clip}
    if grid.min is not None and grid.max is not None:
        params = grid.qparams()
        facts |= {"min": grid.min, "max": grid.max, "scale": float(params.scale), "zero_point": int(params.zero_point)}
        if histogram is not None:
            facts["clipped"] = clipped_share(histogram, grid.min, grid.max)
    return facts


def clipped_share(histogram: Histogram, low: float, high: float) -> float:
    """The share of values outside a range, 0 to 1, as far as bins tell: one counts that lies outside as a whole.

    >>> clipped_share(Histogram(0.0, 1.0, (6, 3, 1), zeros=10), 0.0, 2.0)
    0.05
    """
    edges = histogram.edges().tolist()
    outside = sum(
        count
        for start, end, count in zip(edges, edges[1:], histogram.counts, strict=False)
        if count and (end <= low or start >= high)
    )
    return outside / histogram.total


def bars(histogram: Histogram, most: int = _BARS) -> Bars:
    """The histogram with at most so many bins: neighbours are added up.

    >>> bars(Histogram(0.0, 1.0, (1, 2, 3, 4, 5)), most=2)
    Bars(low=0.0, width=3.0, counts=(6, 9), zeros=0)
    """
    counts = histogram.counts
    step = -(-len(counts) // most)
    added = tuple(sum(counts[start : start + step]) for start in range(0, len(counts), step))
    return Bars(histogram.low, histogram.width * step, added, histogram.zeros)
