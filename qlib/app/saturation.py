"""Products of 8 bits that saturate on x86 without VNNI: counted on calibration images, and avoided by 7-bit weights."""

from __future__ import annotations

import logging

from torch import fx

from qlib.app.images import calibration_batches
from qlib.app.job import Job
from qlib.graph import Graph
from qlib.lower import exact_arithmetic, lower
from qlib.lower.saturation import SaturationRate, pairs_at_risk, saturation_rates
from qlib.ptq.reduce_range import reduce_range
from qlib.quant.plan import Plan

__all__ = ["avoid_saturation", "measure_saturation"]

_log = logging.getLogger(__name__)

_IMAGES = 64
_BATCH = 16


def measure_saturation(job: Job, lowered: fx.GraphModule) -> dict[str, SaturationRate]:
    """How often each layer saturates on x86 without VNNI, on calibration images if there are any."""
    pairs = pairs_at_risk(lowered)
    if not any(pairs.values()) or not job.has_images:
        return {name: SaturationRate(count, 0, 0) for name, count in pairs.items()}
    with exact_arithmetic():
        return saturation_rates(lowered, (x for x, _ in calibration_batches(job, _IMAGES, _BATCH)))


def avoid_saturation(job: Job, graph: Graph, plan: Plan) -> Plan:
    """The plan with 7-bit weights where `--qe-reduce-range` asks for them."""
    wanted = job.config.qe.reduce_range
    if wanted == "none":
        return plan
    reduced = reduce_range(plan, list(plan.layers)) if wanted == "all" else plan
    while wanted == "auto":  # a layer may begin to saturate when those before it no longer do
        rates = measure_saturation(job, lower(graph, reduced).to(job.device))
        names = [name for name, rate in rates.items() if rate.saturated]
        if not names:
            break
        reduced = reduce_range(reduced, names)
    changed = [name for name, layer in reduced.layers.items() if layer != plan.layers[name]]
    _log.info("--qe-reduce-range %s: %d layers get 7-bit weights%s", wanted, len(changed), _listed(changed))
    return reduced


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""
