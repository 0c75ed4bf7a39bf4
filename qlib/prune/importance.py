"""What an error in a layer's output does to the logits."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from qlib.graph import Graph
from qlib.graph.weights import over_channels
from qlib.prune.layers import PrunedLayer

__all__ = ["output_importance"]


def output_importance(
    graph: Graph, layers: Iterable[PrunedLayer], batches: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """For each output channel of each layer ``sum |d logits / d y|^2`` over its positions, a mean over the images.

    ``E[(d (v logits) / d y)^2]`` for random v of unit variance: one pass backward in place of one for each class.
    Returns ``[out]`` in float64 by the names of the layers' nodes.
    """
    found: dict[str, Tensor] = {}
    images = 0

    def add(layer: PrunedLayer, gradient: Tensor) -> None:
        squares = over_channels(layer.module, gradient).double().square().sum(0)
        found[layer.node.name] = found.get(layer.node.name, torch.zeros_like(squares)) + squares

    def watch(layer: PrunedLayer, module: object, inputs: object, output: Tensor) -> None:
        output.register_hook(partial(add, layer))  # type: ignore[no-untyped-call]

    hooks = [layer.module.register_forward_hook(partial(watch, layer)) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    try:
        for batch in batches:
            images += len(batch)
            seen = batch.clone().requires_grad_()
            logits = graph(seen)
            direction = torch.randn(logits.shape, generator=generator).to(logits.device)
            torch.autograd.grad((logits * direction).sum(), seen)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: squares / images for name, squares in found.items()}
