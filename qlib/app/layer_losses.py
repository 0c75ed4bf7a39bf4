"""How much each layer alone changes what a quantized model predicts, at the settings of a job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from qlib.app.correct import correct_float
from qlib.app.job import Job
from qlib.app.plan import plan_of, settings_of, stats_for
from qlib.app.search import measure_sensitivity
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.graph import FoldedGraph
from qlib.search.sensitivity import ACTIVATIONS, WEIGHTS

__all__ = ["OWN_BITS", "LayerLosses"]

OWN_BITS = 0
"""Stands for the bits that each layer has by its settings."""


@dataclass(frozen=True)
class LayerLosses:
    """Layer -> the divergence that its weights and its activations make, and the settings that it was measured with."""

    ptq: PtqConfig
    settings: dict[str, LayerSettings]
    divergence: dict[str, float]

    @classmethod
    def of(cls, job: Job, folded: FoldedGraph, bits: int = OWN_BITS) -> LayerLosses:
        """Measures all layers at these bits on calibration images; the weights of `folded` may be corrected."""
        ptq, settings = settings_of(job, folded)
        correct_float(job, folded)
        planner = partial(plan_of, folded, stats_for(job, folded, ptq, settings))
        rows, _ = measure_sensitivity(job, folded.graph, settings, planner, (bits,), (WEIGHTS, ACTIVATIONS))
        lost: dict[str, float] = {}
        for row in rows:
            lost[row.layer] = lost.get(row.layer, 0.0) + row.divergence
        return cls(ptq, settings, lost)
