"""What channel classes cost: the parameters and multiply-accumulates of a graph without some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.graph.coordinates import ChannelClasses
from qlib.graph.coordinates_unions import varying
from qlib.graph.ir import Graph, layer_inputs, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.ops import ChannelAffine

__all__ = ["ClassCosts", "Term", "class_costs"]


@dataclass(frozen=True, eq=False)
class Term:
    """A number of parameters or products: ``constant * prod(kept indices of each factor) / images``.

    Each factor is an axis, as the class of each of its indices.

    >>> term = Term("conv", 9, 1, (torch.tensor([1, 1, 2]), torch.tensor([2, 3])))
    >>> term.total(torch.tensor([True, False, True, True])), term.each(3).tolist()
    (18, [0, 36, 36, 27])
    """

    layer: str
    constant: int
    images: int
    factors: tuple[Tensor, ...]

    def total(self, keep: Tensor) -> int:
        """The number, with the classes that stay."""
        return self.constant * math.prod(int(keep[factor].sum()) for factor in self.factors) // self.images

    def each(self, count: int) -> Tensor:
        """How much smaller it is without each class alone: ``[count + 1]``, 0 for class 0."""
        whole, rest = torch.tensor(self.constant), torch.full((count + 1,), self.constant)
        for factor in self.factors:
            whole, rest = whole * len(factor), rest * (len(factor) - torch.bincount(factor, minlength=count + 1))
        saved: Tensor = (whole - rest) // self.images
        saved[0] = 0
        return saved


@dataclass(frozen=True, eq=False)
class ClassCosts:
    """The parameters of a graph and the products of its layers, for one image, as functions of what is kept."""

    count: int
    parameters: tuple[Term, ...]
    macs: tuple[Term, ...]

    def total_parameters(self, keep: Tensor) -> int:
        """The parameters that are left; `keep` is of ``ChannelClasses.keeps``."""
        return sum(term.total(keep) for term in self.parameters)

    def total_macs(self, keep: Tensor) -> int:
        """The multiply-accumulates that are left."""
        return sum(term.total(keep) for term in self.macs)

    def parameters_of_each(self) -> Tensor:
        """The parameters that go with each class alone: ``[count + 1]``."""
        return sum((term.each(self.count) for term in self.parameters), torch.zeros(self.count + 1, dtype=torch.int64))

    def macs_of_each(self) -> Tensor:
        """The multiply-accumulates that go with each class alone: ``[count + 1]``."""
        return sum((term.each(self.count) for term in self.macs), torch.zeros(self.count + 1, dtype=torch.int64))


def class_costs(graph: Graph, classes: ChannelClasses) -> ClassCosts:
    """The costs of a graph and of its classes.

    Law: ``total_macs(keep)`` is the sum of `layer_macs` of the graph that is thinned so, and `total_parameters` counts
    its parameters, those that are used twice once.

    >>> from qlib.graph.capture import capture
    >>> from qlib.graph.coordinates import channel_classes
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 10))
    >>> graph = capture(model, torch.zeros(2, 3, 1, 1))
    >>> costs = class_costs(graph, channel_classes(graph))
    >>> costs.parameters_of_each().tolist(), costs.macs_of_each().tolist()
    ([0, 14, 14, 14, 14], [0, 13, 13, 13, 13])
    """
    return ClassCosts(classes.count, tuple(_parameters(graph, classes)), tuple(_macs(graph, classes)))


def _parameters(graph: Graph, classes: ChannelClasses) -> Iterator[Term]:
    for name, value in graph.named_parameters():
        axes = {axis: found for axis in range(value.ndim) if (found := classes.of(name, axis)) is not None}
        rest = math.prod(size for axis, size in enumerate(value.shape) if axis not in axes)
        yield Term(name, rest, 1, tuple(axes.values()))


def _macs(graph: Graph, classes: ChannelClasses) -> Iterator[Term]:
    images = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["shape"][0]
    for node, module in layers(graph):
        if layer_kind(module).accumulates and not isinstance(module, ChannelAffine):
            (out, of_out), (source, of_source) = (_factors(classes, each) for each in (node, layer_inputs(node)[0]))
            if not isinstance(module, nn.modules.conv._ConvNd):
                inner, of_inner = _axis(classes, layer_inputs(node)[0], -1)
                yield Term(name_of(node), out * inner, images, (*of_out, *of_inner))
                continue
            volume, factors = (source, of_source) if module.transposed else (out, of_out)
            kernel, axis = math.prod(module.kernel_size), layer_inputs(node)[0]
            columns, of_columns = _axis(classes, node if module.transposed else axis, 1)
            if module.groups > 1:
                columns, of_columns = module.weight.shape[1], ()
            yield Term(name_of(node), volume * kernel * columns, images, (*factors, *of_columns))


def _labels(classes: ChannelClasses, node: fx.Node) -> Tensor:
    labels = classes.values[node.name]
    assert isinstance(labels, Tensor)
    return labels


def _factors(classes: ChannelClasses, node: fx.Node) -> tuple[int, tuple[Tensor, ...]]:
    """The elements of an activation: those of the axes that stay, and the classes of the one that does not."""
    labels = _labels(classes, node)
    found = [_axis(classes, node, axis) for axis in range(labels.ndim)]
    return math.prod(size for size, _ in found), tuple(factor for _, factors in found for factor in factors)


def _axis(classes: ChannelClasses, node: fx.Node, axis: int) -> tuple[int, tuple[Tensor, ...]]:
    """The size of an axis that stays, or 1 and the classes of one that does not."""
    labels = _labels(classes, node)
    axis %= labels.ndim
    if axis not in varying(labels):
        return labels.shape[axis], ()
    return 1, (labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))],)
