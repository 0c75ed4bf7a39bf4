"""What each layer of a captured graph costs: multiply-accumulates, weights, sizes of its input and output."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, layer_inputs, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.ops import ChannelAffine, Function

__all__ = ["LayerCost", "layer_costs", "layer_macs"]


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


def layer_macs(graph: Graph) -> dict[str, int | None]:
    """Layer name -> multiply-accumulates for one image, None where they are not known; `graph` may be folded.

    A batch-norm has none, be it folded, a scaling of its own or in float.

    >>> import torch
    >>> from qlib.graph.folded import fold
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    >>> layer_macs(fold(model, torch.zeros(2, 3, 4, 4)).graph)
    {'0': 3456, '2': 0}
    """
    batch = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["shape"][0]
    found: dict[str, int | None] = {}
    for node, module in layers(graph):
        macs = _macs(module, [_shape(source) for source in layer_inputs(node)], _shape(node))
        found[name_of(node)] = None if _multiplies(module) else macs // batch
    return found


def _macs(module: nn.Module, inputs: list[tuple[int, ...]], ofm: tuple[int, ...]) -> int:
    """For each element of the output the products it is a sum of; transposed, those each input element goes into."""
    kind = layer_kind(module)
    if isinstance(module, ChannelAffine) or not kind.accumulates:
        return 0
    if isinstance(module, nn.modules.conv._ConvNd):
        each = math.prod(module.weight.shape[1:])  # [out, in / groups, k...]; transposed [in, out / groups, k...]
        return _volume(inputs[0] if module.transposed else ofm) * each
    return _volume(ofm) * inputs[0][-1]  # the inner axis of the product is the last one of the first input


_PRODUCT_NAMES = "conv linear bilinear matmul einsum dot tensordot mm bmm addmm baddbmm mv attention lstm gru rnn"
"""Words in the names of functions that add up products."""

_RESIZES = "upsample interpolate"
"""Words in the names of functions that resize, by ``bilinear`` formulas too."""


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer without a kind of its own adds up products: nobody has counted them."""
    if layer_kind(module).integer_bits:
        return False
    name = module.title if isinstance(module, Function) else ""
    matrices = any(parameter.ndim > 1 for parameter in module.parameters()) and not isinstance(module, nn.LayerNorm)
    words = set(re.split(r"[_\d]+", name))
    return matrices or (not words.isdisjoint(_PRODUCT_NAMES.split()) and words.isdisjoint(_RESIZES.split()))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _volume(shape: tuple[int, ...]) -> int:
    return math.prod(shape) if shape else 0
