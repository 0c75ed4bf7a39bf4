"""What each layer of a captured graph costs: multiply-accumulates, weights, sizes of its input and output."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, kind_of, layer_inputs, layers, name_of

__all__ = ["LayerCost", "layer_costs"]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer for one image.

    `type` is the class of its module, `attrs` its kernel as ``k=(3, 3)``; `ifm` and `ofm` are the shapes of its first
    input and of its output, ``()`` where that is not one tensor. `weights` counts the elements of its weight (not of
    a bias or a scale: a weight has two axes or more), `macs` the products that it adds up, without the bias.
    """

    name: str
    type: str
    attrs: str
    ifm: tuple[int, ...]
    ofm: tuple[int, ...]
    weights: int
    macs: int

    @property
    def ifm_volume(self) -> int:
        """Elements of the first input."""
        return _volume(self.ifm)

    @property
    def ofm_volume(self) -> int:
        """Elements of the output."""
        return _volume(self.ofm)


def layer_costs(graph: Graph) -> list[LayerCost]:
    """The costs of all layers in execution order; the graph was captured with a batch of one, before folding.

    A layer that is used twice is there twice, as ``conv`` and ``conv_1``, each time with its weights.

    >>> import torch
    >>> from qlib.graph.capture import capture
    >>> graph = capture(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 4, 4))
    >>> [(cost.name, cost.attrs, cost.ofm, cost.weights, cost.macs) for cost in layer_costs(graph)]
    [('0', 'k=(3, 3)', (1, 8, 4, 4), 216, 3456), ('1', '', (1, 8, 4, 4), 0, 0)]
    """
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    assert image.meta["shape"][0] == 1, "costs are those of one image"
    return [_cost(node, module) for node, module in layers(graph)]


def _cost(node: fx.Node, module: nn.Module) -> LayerCost:
    inputs = [_shape(source) for source in layer_inputs(node)]
    weight = getattr(module, "weight", None)
    return LayerCost(
        name=name_of(node),
        type=type(module).__name__,
        attrs=f"k={module.kernel_size}" if isinstance(module, nn.modules.conv._ConvNd) else "",
        ifm=inputs[0] if inputs else (),
        ofm=_shape(node),
        weights=weight.numel() if isinstance(weight, Tensor) and weight.ndim > 1 else 0,
        macs=_macs(module, inputs, _shape(node)),
    )


def _macs(module: nn.Module, inputs: list[tuple[int, ...]], ofm: tuple[int, ...]) -> int:
    """For each element of the output the products it is a sum of; transposed, those each input element goes into."""
    kind = kind_of(module)
    if kind in ("conv", "conv_transpose"):
        assert isinstance(module.weight, Tensor)
        each = math.prod(module.weight.shape[1:])  # [out, in / groups, k...]; transposed [in, out / groups, k...]
        return _volume(ofm if kind == "conv" else inputs[0]) * each
    if kind in ("linear", "matmul"):  # the inner axis of the product is the last one of the first input
        return _volume(ofm) * inputs[0][-1]
    return 0


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _volume(shape: tuple[int, ...]) -> int:
    return math.prod(shape) if shape else 0
