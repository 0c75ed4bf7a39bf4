"""Channel classes: which rows, columns and entries of a model's tensors must be kept or removed together.

A coordinate is (parameter, axis, index). Coordinates that shapes tie together, by an addition, a concatenation, a
shuffle, groups or heads, are one class. How they are found: each activation has a tensor of its shape that holds, for
each element, the coordinate that produced it; moves are applied to it as they are, layers join coordinates by the rules
of `coordinates_rules`, and what would not stay a rectangle without one of them is joined too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlib.graph.coordinates_trace import LabelTracer
from qlib.graph.coordinates_unions import narrowed, varying
from qlib.graph.ir import Graph

__all__ = ["ChannelAxis", "ChannelClasses", "Entry", "channel_classes"]

Entry = tuple[str, int, Tensor]
"""Name of a tensor of the graph, axis, indices along it."""


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """An axis of a parameter or buffer: `classes[i]` is the class of index i, 0 for what always stays."""

    name: str
    axis: int
    classes: Tensor


@dataclass(frozen=True, eq=False)
class ChannelClasses:
    """The classes of a graph, numbered from 1 in the order of the layers that make them; 0 is what always stays.

    Laws: each index of each axis in `axes` has one class. Without any subset of the classes 1..count, as long as each
    axis keeps an index, every tensor of the graph is a rectangle, and all shapes fit. If the entries of a class are 0
    and `neutral[class]`, the graph computes what it computes without them. Classes are not neutral that a mean, a
    deviation or a maximum is over: those of layer norms, above all.

    `values` has the classes of each element of each node's activation, by the node's name in the graph.

    >>> from torch import nn
    >>> from qlib.graph.capture import capture
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    >>> classes = channel_classes(capture(model, torch.zeros(2, 3, 1, 1)))
    >>> classes.count
    4
    >>> [(name, axis, indices.tolist()) for name, axis, indices in classes.entries(2)][:3]
    [('0.weight', 0, [1]), ('0.bias', 0, [1]), ('1.weight', 0, [1])]
    """

    count: int
    axes: tuple[ChannelAxis, ...]
    neutral: Tensor
    summed: Tensor
    values: Mapping[str, Tensor | Sequence[Tensor]] = field(repr=False)

    def entries(self, number: int) -> list[Entry]:
        """All coordinates of a class."""
        found = ((each.name, each.axis, (each.classes == number).nonzero().flatten()) for each in self.axes)
        return [entry for entry in found if len(entry[2])]

    def of(self, name: str, axis: int) -> Tensor | None:
        """The classes along an axis of a tensor; None where all of it always stays."""
        return next((each.classes for each in self.axes if (each.name, each.axis) == (name, axis)), None)

    def keeps(self, removed: Iterable[int]) -> Tensor:
        """Whether each class stays, without some: ``[count + 1]``.

        >>> ChannelClasses(3, (), torch.ones(4), torch.ones(4), {}).keeps([2])
        tensor([ True,  True, False,  True])
        """
        keep = torch.ones(self.count + 1, dtype=torch.bool)
        numbers = torch.as_tensor(list(removed), dtype=torch.int64)
        assert not numbers.numel() or (int(numbers.min()) > 0 and int(numbers.max()) <= self.count)
        keep[numbers] = False
        return keep

    def rows(self) -> Iterator[tuple[range, list[Entry]]]:
        """Consecutive classes with as many indices on the same axes, and the entries of the first."""
        width = self.count + 1
        touched = torch.stack([torch.bincount(each.classes, minlength=width) for each in self.axes] or [torch.zeros(1)])
        ends = (touched[:, 1:-1] != touched[:, 2:]).any(0).nonzero().flatten().add(2).tolist()
        for start, end in itertools.pairwise([1, *ends, width] if self.count else []):
            yield range(start, end), self.entries(start)


def channel_classes(graph: Graph) -> ChannelClasses:
    """The classes of a captured graph, whose batch-norms may be folded.

    What a rule is not known for is pinned, and so are the images, the logits, and what a softmax is over.
    """
    tracer = LabelTracer(graph)
    tracer.trace()
    axes = list(_axes(graph, tracer))
    roots = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), *(labels for _, _, labels in axes)]))

    def numbers(labels: Tensor) -> Tensor:
        few = narrowed(tracer.unions.roots(labels)).contiguous()
        places = torch.searchsorted(roots, few).clamp(max=len(roots) - 1)
        found: Tensor = places * (roots[places] == few)
        return found.expand(labels.shape)

    neutral, summed = torch.ones(len(roots), dtype=torch.bool), torch.zeros(len(roots), dtype=torch.bool)
    for labels in tracer.counted:
        neutral[numbers(labels)] = False
    for labels in tracer.summed:
        summed[numbers(labels)] = True
    neutral[0] = True
    values = {
        node.name: numbers(value) if isinstance(value, Tensor) else tuple(map(numbers, value))
        for node, value in tracer.values.items()
    }
    found = tuple(ChannelAxis(name, axis, numbers(labels)) for name, axis, labels in axes)
    varied = tuple(each for each in found if bool(each.classes.any()))
    return ChannelClasses(len(roots) - 1, varied, neutral, summed, values)


def _axes(graph: Graph, tracer: LabelTracer) -> Iterator[Entry]:
    """Name, axis and roots of each axis of a tensor that is tied, under each of its names."""
    tensors = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    elements = {key: tracer.unions.roots(labels) for key, labels in tracer.elements.items()}
    for name, tensor in tensors:
        for axis in range(tensor.ndim):
            labels = elements.get(id(tensor))
            if (id(tensor), axis) in tracer.tied:
                yield name, axis, tracer.unions.roots(tracer.tied[id(tensor), axis])
            elif labels is not None and varying(labels) == [axis]:
                yield name, axis, labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))]
