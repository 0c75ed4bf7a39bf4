"""AdaRound: each layer's weights are rounded so that its own output changes least."""

from __future__ import annotations

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._reconstruct import Options, reconstruct
from qlib.correct._units import layer_units
from qlib.graph import Graph
from qlib.quant.plan import Plan

__all__ = ["adaround"]

ITERATIONS = 500


@CORRECTIONS.register("adaround", order=11, choice="rounding", images=True, iterates=True)
def adaround(graph: Graph, plan: Plan, images: CalibrationImages, iterations: int | None = None) -> Plan:
    """Learns, layer after layer, whether each weight is rounded up or down; the weights of `graph` are set to that.

    ``min |f(W x) - f(W~ x_q)|^2`` over the roundings W~, with the layer's activation f, for the inputs x_q that the
    fake-quantized layers before it give.

    References: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020, equation 25.
    """
    return reconstruct(graph, plan, layer_units(graph), images, Options(iterations or ITERATIONS, learn_scales=False))
