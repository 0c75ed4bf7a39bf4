"""Activation statistics without images."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qlib.errors import StatsError
from qlib.graph import Graph, NormStatistics
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.stats.moments import Moments, propagate
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats

__all__ = ["data_free_stats", "image_range_of"]


def data_free_stats(
    graph: Graph, norms: Mapping[str, NormStatistics], image_range: tuple[Tensor, Tensor]
) -> ModelStats:
    """The statistics of every layer of a folded graph, from what its batch-norms know.

    A layer that ended in a batch-norm reaches from ``beta - 6 gamma`` to ``beta + 6 gamma``, the largest of all
    channels; the other layers follow from those before them (see `stats.moments`). `image_range`: the least and the
    greatest value of each color of the images, ``[colors]`` each. `avg_min` and `avg_max` stay unknown.

    Raises StatsError, naming the layer, where no batch-norm tells anything.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, section 5.
    """
    moments = propagate(graph, norms, image_range)
    found: dict[str, LayerStats] = {}
    samples = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["shape"][0]
    for node, _ in layers(graph):
        if node not in moments or _unknown(moments[node]):
            raise StatsError(
                f"layer {name_of(node)!r} has no batch-norm that tells its range, so this model needs images;"
                " drop --ptq-data-free"
            )
        inputs = tuple(_stats(moments[source], samples) for source in layer_inputs(node))
        found[name_of(node)] = LayerStats(inputs, _stats(moments[node], samples))
    return ModelStats(found)


def image_range_of(black: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each color ``[colors]``, from what a black and a white image ``[colors, H, W]`` are turned into.

    >>> image_range_of(torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0))
    (tensor([-1., -1., -1.]), tensor([1., 1., 1.]))
    """
    both = torch.stack([black, white]).flatten(2)
    return both.amin((0, 2)), both.amax((0, 2))


def _unknown(x: Moments) -> bool:
    return any(bool(part.isnan().any()) for part in x.parts)


def _stats(x: Moments, samples: int) -> TensorStats:
    """Those of a whole tensor, a mixture of its elements' normal distributions."""
    mean = float(x.mean.double().mean())
    offset = x.mean.double() - mean
    std = x.variance.double().sqrt().clamp(min=1e-30)
    ratio = offset / std
    deviation = std * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) + offset * torch.erf(ratio / math.sqrt(2))
    return TensorStats(
        count=x.mean.numel(),
        samples=samples,
        min=float(x.low.min()),
        max=float(x.high.max()),
        mean=mean,
        std=float((offset.square() + std.square()).mean().sqrt()),
        b=float(deviation.mean()),
        shape=tuple(x.mean.shape),
    )
