"""Refit: layer by layer, what is left of a pruned model makes up for what is gone, on the pruned model's own inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.correct._stream import Buffer, Stream, track_nodes
from qlib.graph import Graph
from qlib.graph.weights import over_channels
from qlib.prune.layers import PrunedLayer
from qlib.prune.least_squares import LayerMoments, solve_masked

__all__ = ["Repair", "refit", "survey"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Repair:
    """What `refit` does: `weights` are solved anew, `norms` get the statistics of what they see now."""

    weights: bool = True
    norms: bool = True


@torch.no_grad()
def survey(
    graph: Graph, layers: Iterable[PrunedLayer], batches: Iterable[Tensor], folder: Path
) -> Iterator[tuple[PrunedLayer, Tensor]]:
    """Each layer with the central second moments ``[groups, in, in]`` of its inputs; one is in memory at a time."""
    wanted = {each.node.name: each for each in layers}
    with Buffer(folder) as buffer:
        stream = Stream(graph, batches, buffer)
        for node in track_nodes(graph, "Pruning"):
            if (layer := wanted.get(node.name)) is not None:
                moments = LayerMoments()
                for x in stream[node.all_input_nodes[0]]:
                    moments.add(layer.module, x)
                yield layer, moments.own
            stream.advance(node)


@torch.no_grad()
def refit(
    dense: Graph,
    pruned: Graph,
    layers: Mapping[str, PrunedLayer],
    masks: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    folder: Path,
    repair: Repair,
) -> dict[str, float]:
    """Changes the layers of `pruned`, by their nodes' names, and its batch-norms; both graphs have the same nodes.

    A layer gets the least squares weights under its mask, for the outputs of `dense`. A batch-norm's statistics move as
    those of its inputs did: ``mean += mean(x) - mean(y)`` and ``var *= var(x) / var(y)`` for the inputs y of the dense
    model, so that a model that is not changed keeps them, whatever the images.

    Returns ``|Y - Y'|^2 / |Y - mean(Y)|^2`` of each layer's outputs by its parameter's name.
    """
    errors: dict[str, float] = {}
    with Buffer(folder) as buffer:
        images = list(batches)
        ours, theirs = Stream(pruned, images, buffer), Stream(dense, images, buffer)
        for node, other in zip(track_nodes(pruned, "Refit"), dense.graph.nodes, strict=True):
            layer, module = layers.get(node.name), _module(pruned, node)
            if layer is not None and repair.weights:
                inputs = zip(ours[node.all_input_nodes[0]], theirs[other.all_input_nodes[0]], strict=True)
                _solve(layer, _module(dense, other), masks[layer.parameter], inputs)
            if isinstance(module, _NORMS) and module.running_mean is not None and repair.norms:
                _move_statistics(module, ours[node.all_input_nodes[0]], theirs[other.all_input_nodes[0]])
            ours.advance(node)
            theirs.advance(other)
            if layer is not None:
                errors[layer.parameter] = _error(layer.module, ours[node], theirs[other])
    return errors


def _module(graph: Graph, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _solve(layer: PrunedLayer, original: Any, mask: Tensor, inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Sets weight and, if there is one, bias: the mean output is the business of that, or of the batch-norm behind."""
    moments = LayerMoments()
    for x, y in inputs:
        moments.add(layer.module, x, y)
    rows = PrunedLayer(layer.parameter, layer.node, original).rows
    kept = mask.reshape(rows.shape)
    solved = torch.stack([solve_masked(*each) for each in zip(rows, moments.own, moments.cross, kept, strict=True)])
    layer.weight.copy_(layer.as_weight(solved))
    bias = layer.module.bias
    if isinstance(bias, Tensor):
        lost = rows.double() @ moments.other_mean[:, :, None] - solved.double() @ moments.mean[:, :, None]
        gone = ~kept.any(2).flatten() & (bias == 0)  # a channel that is removed with its bias
        bias.copy_(torch.where(gone, 0.0, original.bias.double() + lost.flatten()))


def _move_statistics(norm: nn.Module, ours: list[Tensor], theirs: list[Tensor]) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    (mean_x, var_x), (mean_y, var_y) = (_moments(values) for values in (ours, theirs))
    mean.copy_(mean.double() + mean_x - mean_y)
    var.copy_(var.double() * torch.where(var_y > 0, var_x / var_y, 1.0))


def _moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all batches."""
    channels = [x.movedim(1, -1).flatten(0, -2) for x in values]
    count = sum(len(x) for x in channels)
    mean = torch.stack([x.sum(0, dtype=torch.float64) for x in channels]).sum(0) / count
    squares = [(x - mean.to(x.dtype)).square().sum(0, dtype=torch.float64) for x in channels]
    return mean, torch.stack(squares).sum(0) / count


def _error(module: nn.Module, ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = [(over_channels(module, x), over_channels(module, y)) for x, y in zip(ours, theirs, strict=True)]
    mean = torch.cat([y for _, y in pairs]).mean(0)
    off = sum(float((x - y).double().square().sum()) for x, y in pairs)
    all_of_it = sum(float((y - mean).double().square().sum()) for _, y in pairs)
    return off / all_of_it if all_of_it else 0.0
