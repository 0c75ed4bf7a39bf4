"""A captured graph with its batch-norms folded, and what folding would otherwise forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from qlib.graph.capture import capture
from qlib.graph.fold_bn import fold_batch_norm
from qlib.graph.fuse import fused_activations
from qlib.graph.ir import Graph, layer_inputs, layers, name_of
from qlib.graph.kinds import kind_of, layer_kind
from qlib.graph.norms import NormStatistics, after_folding, norm_statistics
from qlib.graph.recapture import deployed_copy
from qlib.graph.weights import swap_channels

__all__ = ["LAYOUT", "FoldedGraph", "fold", "fold_copy", "lay_out"]

LAYOUT = torch.channels_last
"""Memory layout of graphs and of the images they are given: convolutions take up to half the time on the CPU."""


_Model = TypeVar("_Model", bound=nn.Module)


def lay_out(model: _Model) -> _Model:
    """Puts, in place, the weights of plain convolutions into `LAYOUT`, and no others: a model may take views of those.

    >>> lay_out(nn.Conv2d(2, 3, 3)).weight.stride()
    (18, 1, 6, 2)
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d):
            module.to(memory_format=LAYOUT)
    return model


@dataclass(frozen=True)
class FoldedGraph:
    """The captured graph after folding, which module went into which layer, and what the batch-norms knew.

    `norms`: layer -> statistics of its output before the activation; corrections change graph and norms together.
    """

    graph: Graph
    folded: Mapping[str, str]
    norms: dict[str, NormStatistics] = field(default_factory=dict)

    @property
    def absorbed(self) -> dict[str, str]:
        """Names of batch-norms and activations -> the layer that computes them."""
        fused = {name_of(relu): name_of(producer) for producer, relu in fused_activations(self.graph).items()}
        return {**self.folded, **fused}

    @property
    def layers(self) -> dict[str, tuple[str, int]]:
        """Layer name -> kind and number of tensor inputs."""
        return {name_of(node): (kind_of(module), len(layer_inputs(node))) for node, module in layers(self.graph)}

    @property
    def channels(self) -> dict[str, int]:
        """Layer name -> number of output channels, of layers that have a weight."""
        weighted = ((name_of(node), module) for node, module in layers(self.graph) if layer_kind(module).weighted)
        return {name: swap_channels(module, cast(Tensor, module.weight)).shape[0] for name, module in weighted}


def fold(model: nn.Module, example: Tensor) -> FoldedGraph:
    """Captures a model and folds its batch-norms; `example` as `capture` takes it.

    Raises ModelError where the model cannot be captured.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold(model, torch.zeros(2, 3, 8, 8)).absorbed
    {'1': '0', '2': '0'}
    """
    folded = _fold(capture(model, example))
    lay_out(folded.graph)
    return folded


def fold_copy(graph: Graph) -> FoldedGraph:
    """As `fold`, of a copy of a captured graph, one that trains."""
    return _fold(deployed_copy(graph))


def _fold(graph: Graph) -> FoldedGraph:
    norms = norm_statistics(graph)
    folded = fold_batch_norm(graph)
    return FoldedGraph(graph, folded, after_folding(norms, folded))
