"""Which channel of the layer before it each input channel of a layer comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, is_layer, layer_inputs
from qlib.graph.kinds import layer_kind
from qlib.graph.weights import channel_axis

__all__ = ["Origin", "input_origins"]


@dataclass(frozen=True, eq=False)
class Origin:
    """`channels[j]` is the channel, of the last layer that mixes channels, which input channel j holds; -1 for none.

    `padded`: zeros were put beside its values on the way.
    """

    channels: Tensor
    padded: bool


@torch.no_grad()
def input_origins(graph: Graph) -> dict[fx.Node, Origin]:
    """Weighted layer of one input -> where its channels come from, through ReLUs, pools and moves.

    Layers are left out whose input channels hold values of several channels, or of a layer that has none.
    """
    tracer = _Tracer(graph)
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    tracer.run(torch.zeros(image.meta["shape"]))
    return tracer.origins


class _Tracer(fx.Interpreter):
    """Runs the graph on tensors that hold, instead of values, 1 + the number of their channel; 0 where padded."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.origins: dict[fx.Node, Origin] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return torch.full(n.meta["shape"], torch.nan)
        if n.op == "get_attr" and n.meta["tensor"]:
            return torch.full_like(super().run_node(n), torch.nan, device="cpu", dtype=torch.float32)
        if not is_layer(self.module, n) or "shape" not in n.meta:  # type: ignore[arg-type]
            return super().run_node(n)
        module = self.module.get_submodule(str(n.target))
        kind, shape = layer_kind(module), n.meta["shape"]
        inputs = [self.env[source] for source in layer_inputs(n)]
        if kind.pools:
            channels, _ = _per_channel(inputs[0], 1)
            return channels.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        if kind.keeps_grid:
            return inputs[0]
        if not kind.affine and not isinstance(module, nn.LayerNorm):
            return torch.full(shape, torch.nan)
        axis = channel_axis(module)
        if kind.affine and len(inputs) == 1:
            channels, padded = _per_channel(inputs[0], axis)
            if not bool(channels.isnan().any()):
                self.origins[n] = Origin(channels.long() - 1, padded)
        numbers = torch.arange(1, shape[axis] + 1, dtype=torch.float32)
        return numbers.view([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]).expand(shape)


def _per_channel(x: Tensor, axis: int) -> tuple[Tensor, bool]:
    """The number that each channel of `x` holds, NaN where it holds several; whether there are zeros beside it."""
    axes = [i for i in range(x.ndim) if i != axis % x.ndim]
    if not axes:
        return x, False
    high = x.amax(axes)
    low = torch.where(x == 0, torch.inf, x).amin(axes)
    zero = high == 0
    return torch.where((low == high) | zero, high, torch.nan), bool(((x.amin(axes) == 0) & ~zero).any())
