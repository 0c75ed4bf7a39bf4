"""Layer after layer: what the float model and the fake-quantized model compute before the layer's grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.correct._base import CalibrationImages
from qlib.correct._pairs import single_layers
from qlib.correct._stream import Buffer, Stream
from qlib.graph import Graph
from qlib.graph.ir import name_of
from qlib.graph.weights import over_channels
from qlib.lower.fake import FakeLayer
from qlib.progress import track

__all__ = ["ChannelMoments", "Outputs", "channel_moments", "layer_outputs"]


@dataclass(frozen=True)
class Outputs:
    """A fake-quantized layer, and its outputs before its grid, one for each batch: its own, and the float model's."""

    name: str
    layer: FakeLayer
    fake: Sequence[Tensor]
    exact: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Mean and population standard deviation of each channel, ``[channels]`` in float64."""

    mean: Tensor
    std: Tensor


def layer_outputs(graph: Graph, fake: fx.GraphModule, images: CalibrationImages, description: str) -> Iterator[Outputs]:
    """The weighted layers in execution order; `fake` is made of a graph with the same nodes.

    What is changed in a layer before the next is asked for, the layers after it see.
    """
    single = {node.name for node in single_layers(graph)}
    nodes = list(fake.graph.nodes)
    with Buffer(images.folder) as buffer:
        batches = list(images.batches())
        floats, fakes = Stream(graph, batches, buffer), Stream(fake, batches, buffer)
        for node in track(
            nodes, total_images=len(nodes), batch_size=1, description=description, print_freq=len(nodes),
            count=lambda _: 1, unit="layers",
        ):  # fmt: skip
            layer = fake.get_submodule(str(node.target)) if node.op == "call_module" else None
            floats.advance(node)
            if isinstance(layer, FakeLayer) and node.name in single:
                with torch.no_grad():
                    outputs = [layer.before_rounding(x) for x in fakes[node.all_input_nodes[0]]]
                yield Outputs(name_of(node), layer, outputs, floats[node])
            fakes.advance(node)


def channel_moments(module: nn.Module, outputs: Sequence[Tensor]) -> ChannelMoments:
    """The moments of a weighted layer's channels over all batches.

    >>> moments = channel_moments(nn.Linear(1, 1), [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    >>> moments.mean.item(), round(moments.std.item() ** 2, 9)
    (3.0, 4.666666667)
    """
    parts = [over_channels(module, y) for y in outputs]
    counts = [len(part) for part in parts]
    means = torch.stack([part.mean(0, dtype=torch.float64) for part in parts])
    squares = [
        (part - mean.to(part.dtype)).square().sum(0, dtype=torch.float64)
        for part, mean in zip(parts, means, strict=True)
    ]
    weights = torch.tensor(counts, dtype=torch.float64, device=means.device)[:, None] / sum(counts)
    mean = (means * weights).sum(0)
    within = torch.stack(squares).sum(0) / sum(counts)
    return ChannelMoments(mean, (within + ((means - mean).square() * weights).sum(0)).sqrt())
