"""How noise adds up: the signal-to-noise ratio of each layer's output where all layers before it are quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from qlib.graph import Graph, fused_activations
from qlib.graph.ir import layers, name_of
from qlib.quant.plan import Plan
from qlib.search.replay import QuantState, Replay
from qlib.search.sensitivity import sqnr

__all__ = ["cumulated_sqnr"]


@torch.inference_mode()
def cumulated_sqnr(graph: Graph, plan: Plan, images: Tensor) -> dict[str, float]:
    """Layer -> ``10 log10(|y|^2 / |y_q - y|^2)`` of its output, in dB, on a batch of images; behind a fused ReLU.

    `graph` is the folded one, with the weights that the plan is of; the plan has fixed ranges.
    """
    replay, point = Replay(graph), QuantState.of(graph, plan)
    fused = set(fused_activations(graph).values())
    names = [name_of(node) for node, _ in layers(graph) if node not in fused]
    outputs = sorted(((*replay.output_of(name), name) for name in names), key=lambda each: each[0])
    exact = noisy = replay.start(images)
    found, position = dict[str, float](), 0
    for step, key, name in outputs:
        exact, noisy = replay.run(exact, position, step), replay.run(noisy, position, step, point)
        position = step
        y, rounded = exact.get(key), noisy.get(key)
        if isinstance(y, Tensor) and isinstance(rounded, Tensor) and y.is_floating_point():
            found[name] = sqnr(_energy(y), _energy(rounded - y))
    return found


def _energy(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
