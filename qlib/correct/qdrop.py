"""QDrop: block reconstruction, with a random half of the activations left in float while it learns."""

from __future__ import annotations

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._reconstruct import Options, reconstruct
from qlib.correct._units import block_units
from qlib.correct.brecq import ITERATIONS
from qlib.graph import Graph
from qlib.quant.plan import Plan

__all__ = ["qdrop"]


@CORRECTIONS.register("qdrop", order=13, choice="rounding", images=True, iterates=True)
def qdrop(graph: Graph, plan: Plan, images: CalibrationImages, iterations: int | None = None) -> Plan:
    """As `brecq`; in each step every element of the block's inputs and activations stays in float with chance 1/2.

    What is learned then does not fit the rounding errors of the calibration images alone.

    References: Wei et al., "QDrop: randomly dropping quantization for extremely low-bit post-training quantization",
    2022, section 4.
    """
    options = Options(iterations or ITERATIONS, learn_scales=True, drop=0.5)
    return reconstruct(graph, plan, block_units(graph), images, options)
