"""BRECQ: the weights and activation scales of a whole block are chosen so that the block's output changes least."""

from __future__ import annotations

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._reconstruct import Options, reconstruct
from qlib.correct._units import block_units
from qlib.graph import Graph
from qlib.quant.plan import Plan

__all__ = ["brecq"]

ITERATIONS = 500


@CORRECTIONS.register("brecq", order=12, choice="rounding", images=True, iterates=True)
def brecq(graph: Graph, plan: Plan, images: CalibrationImages, iterations: int | None = None) -> Plan:
    """Learns the roundings of all weights of a block together, and the scales of its activations.

    A block is what stands between two places where one tensor alone passes on: a residual block, or a plain layer.
    With squared error in place of the paper's error weighted by squared gradients, and AdaRound's rounding.

    References: Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", 2021.
    """
    return reconstruct(graph, plan, block_units(graph), images, Options(iterations or ITERATIONS, learn_scales=True))
