"""Channels that do nothing: those that no weight reads, and those that are one number, which the next bias takes in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.graph.ir import Graph, layer_inputs, layers, tensor_users
from qlib.graph.norms import BATCH_NORMS
from qlib.graph.weights import channel_axis, swap_channels
from qlib.surgery.thin import thin

__all__ = ["DeadClasses", "dead_classes", "thin_dead"]


@dataclass(frozen=True)
class DeadClasses:
    """Classes that can go: no weight reads the `unread`; the `constant` are one number, on all images.

    `at_borders` are those of the constant whose number is not 0, and which a convolution reads that pads with zeros:
    without them its outputs change there, and nowhere else.
    """

    unread: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    at_borders: tuple[int, ...] = ()

    @property
    def all(self) -> list[int]:
        """All of them, but one of each layer that would be left without any."""
        return sorted({*self.unread, *self.constant})


@torch.no_grad()
def thin_dead(graph: Graph) -> tuple[Graph, DeadClasses]:
    """A new graph without its dead classes, and what they were.

    Law: it computes what the graph computes, but for what `at_borders` tells.

    >>> from qlib.graph.capture import capture
    >>> model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    >>> for parameter, index, value in ((model[0].weight, 0, 0.0), (model[0].bias, 0, 2.0)):
    ...     parameter.data[index] = value  # the first channel is 2
    >>> model[2].weight.data[:, 1] = 0  # and nothing reads the second
    >>> small, dead = thin_dead(capture(model, torch.zeros(2, 3, 4, 4)))
    >>> dead, small.get_submodule("2").weight.shape[1]
    (DeadClasses(unread=(2,), constant=(1,), at_borders=()), 1)
    >>> x = torch.randn(1, 3, 4, 4)
    >>> torch.allclose(small(x), model(x))
    True
    """
    classes = channel_classes(graph)
    dead = dead_classes(graph, classes)
    absorbed = copy.deepcopy(graph)
    _absorb(absorbed, classes, dead.constant)
    small = thin(absorbed, dead.all, classes)
    return small, dead


@torch.no_grad()
def dead_classes(graph: Graph, classes: ChannelClasses) -> DeadClasses:
    """The classes of a graph that do nothing; one stays of each layer that would be left without any."""
    read, has_reader = _holds_any(graph, classes, _readers(graph))
    made, has_maker = _holds_any(graph, classes, _makers(graph))
    unread = has_reader & ~read & classes.neutral & ~classes.summed
    constant = has_maker & ~made & ~unread & classes.neutral & ~classes.summed & ~_of_constants(graph, classes)
    keep = ~(unread | constant)
    for each in classes.axes:
        if not bool(keep[each.classes].any()):
            keep[each.classes[0]] = True
    unread, constant = unread & ~keep, constant & ~keep
    exact = torch.ones(classes.count + 1, dtype=torch.bool)
    for reader in _constants(graph, classes, constant):
        constant[reader.classes[~reader.same]] = False
        if not reader.absorbs:
            constant[reader.classes[reader.value != 0]] = False
        elif reader.pads:
            exact[reader.classes[reader.value != 0]] = False
    return DeadClasses(*(tuple(each.nonzero().flatten().tolist()) for each in (unread, constant, constant & ~exact)))


_Axis = tuple[str, int]
_ROUNDING = 1e-6
"""Difference of one number, computed in the middle and at the end of a row."""


def _readers(graph: Graph) -> Iterator[_Axis]:
    """The axis of inputs of each weight, but of those in groups."""
    for node, module in layers(graph):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1):
            yield f"{node.target}.weight", 0 if getattr(module, "transposed", False) else 1


def _makers(graph: Graph) -> Iterator[_Axis]:
    """The axis of outputs of each weight, but of those in groups."""
    return ((name, 1 - axis) for name, axis in _readers(graph))


def _holds_any(graph: Graph, classes: ChannelClasses, axes: Iterator[_Axis]) -> tuple[Tensor, Tensor]:
    """Whether each class has weights along these axes that are not zero, and whether it has any at all."""
    nonzero, there = torch.zeros(2, classes.count + 1, dtype=torch.bool)
    for name, axis in axes:
        found = classes.of(name, axis)
        if found is not None:
            weight = graph.get_parameter(name)
            nonzero[found[(weight.movedim(axis, 0).flatten(1) != 0).any(1).cpu()]] = True
            there[found] = True
    nonzero[0] = there[0] = False
    return nonzero, there


def _of_constants(graph: Graph, classes: ChannelClasses) -> Tensor:
    """Whether each class has entries in a tensor that is added or multiplied as it is."""
    found = torch.zeros(classes.count + 1, dtype=torch.bool)
    constants = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for each in classes.axes:
        if each.name in constants:
            found[each.classes] = True
    return found


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads constant channels: for each one its class, its number, and whether it is the same everywhere.

    `add` adds numbers to its outputs; None where nothing can.
    """

    module: nn.Module
    classes: Tensor
    value: Tensor
    same: Tensor
    add: Callable[[Tensor], None] | None

    @property
    def absorbs(self) -> bool:
        """Whether its outputs can be shifted."""
        return self.add is not None

    @property
    def pads(self) -> bool:
        """Whether it puts zeros around its input."""
        padding: Any = getattr(self.module, "padding", 0)
        return padding not in (0, "valid") and (isinstance(padding, str) or any(padding))


def _constants(graph: Graph, classes: ChannelClasses, wanted: Tensor) -> Iterator[_Reader]:
    """The layers that read these classes, with what they read on random images."""
    inputs = _Inputs(graph)
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    device = next(graph.parameters()).device
    inputs.run(torch.randn(image.meta["shape"], generator=torch.Generator().manual_seed(0)).to(device))
    of_inputs = dict(_readers(graph))
    for node, module in layers(graph):
        name = f"{node.target}.weight"
        found = classes.of(name, of_inputs[name]) if name in of_inputs else None
        if found is not None and bool(wanted[found].any()):
            low, high = inputs.ends[node]
            gone = torch.where(wanted[found], found, 0)
            same = high - low <= _ROUNDING * high.abs().clamp(min=1)
            yield _Reader(module, gone, low, same | (gone == 0), _shift(graph, node, module))


class _Inputs(fx.Interpreter):
    """Runs a graph, and keeps the smallest and largest value of each channel that a weighted layer reads."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.ends: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.submodules[str(n.target)] if n.op == "call_module" else None
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            rows = self.env[layer_inputs(n)[0]].movedim(channel_axis(layer), -1).flatten(0, -2)
            self.ends[n] = rows.amin(0).cpu(), rows.amax(0).cpu()
        return super().run_node(n)


def _shift(graph: Graph, node: fx.Node, module: nn.Module) -> Callable[[Tensor], None] | None:
    """What adds numbers to the outputs of a layer: to its bias, or to what the batch-norm after it subtracts."""
    bias = module.bias
    if sum(each.target == node.target for each in graph.graph.nodes) > 1:
        return None
    if isinstance(bias, Tensor):
        return partial(_add, bias, 1)
    users = tensor_users(node)
    norm = graph.get_submodule(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
    if isinstance(norm, BATCH_NORMS) and isinstance(mean := norm.running_mean, Tensor):
        return partial(_add, mean, -1)
    return None


def _add(tensor: Tensor, sign: int, numbers: Tensor) -> None:
    tensor.add_(numbers.to(tensor), alpha=sign)


def _absorb(graph: Graph, classes: ChannelClasses, constant: tuple[int, ...]) -> None:
    """Puts what constant classes add to the layers that read them into those, in place."""
    wanted = ~classes.keeps(constant)
    for reader in _constants(graph, classes, wanted):
        weight = reader.module.weight
        assert isinstance(weight, Tensor)
        value = torch.where(reader.classes > 0, reader.value, 0.0).double().to(weight.device)
        columns = (
            swap_channels(reader.module, weight.detach()).double().flatten(2).sum(2)
            if weight.ndim > 2
            else weight.double()
        )
        if reader.add is not None:
            reader.add(columns @ value)
