"""A graph run on label tensors: for each element of an activation the coordinate that produced it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlib.graph import ops
from qlib.graph.coordinates_rules import rule_of
from qlib.graph.coordinates_unions import PINNED, Unions, count_roots, narrowed, varying
from qlib.graph.ir import Graph, attribute, is_constant, is_layer, layer_inputs
from qlib.graph.kinds import layer_kind

__all__ = ["LabelTracer"]

Labels = Tensor | Sequence[Tensor]


class LabelTracer(fx.Interpreter):
    """Runs a graph once, on labels: moves move them, layers tie them by their rules, the union-find joins them.

    `tied` has the labels of each axis of a tensor, `elements` those of each element of a constant: both by the tensor's
    id. `values` has the labels of each node.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.unions = Unions()
        self.tied: dict[tuple[int, int], Tensor] = {}
        self.elements: dict[int, Tensor] = {}
        self.counted: list[Tensor] = []
        self.summed: list[Tensor] = []
        self.made: dict[nn.Module, Tensor] = {}
        self.values: dict[fx.Node, Labels] = {}
        self.unsettled: set[fx.Node] = set()
        self.layer: nn.Module = graph

    @torch.no_grad()
    def trace(self) -> None:
        """Runs the graph; what is of one class all along an axis stays, and constants that would be no rectangle."""
        image = next(node for node in self.graph_module.graph.nodes if node.op == "placeholder")
        self.run(torch.tensor(PINNED).expand(image.meta["shape"]))
        while pinned := [*filter(self._stays, self._everything())]:
            for labels in pinned:
                self.pin(labels)

    def _everything(self) -> Iterator[Tensor]:
        for value in (*self.tied.values(), *self.elements.values(), *self.values.values()):
            yield from [value] if isinstance(value, Tensor) else value

    def _stays(self, labels: Tensor) -> bool:
        """Whether a tensor could not lose a part: it is of one class, or of one along two axes."""
        roots = self.unions.roots(labels)
        axes = varying(roots)
        one = not axes and roots.numel() > 0 and int(narrowed(roots).flatten()[0]) != PINNED
        return one or len(axes) > 1

    @property
    def graph_module(self) -> Graph:
        """The graph that is run."""
        assert isinstance(self.module, fx.GraphModule)
        return self.module

    def run_node(self, n: fx.Node) -> Any:
        if not n.meta["tensor"] and n.op != "output":
            return super().run_node(n)
        found = self._labels(n)
        self.values[n] = found
        return found

    def _labels(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return super().run_node(n)
        if n.op == "output":
            for source in layer_inputs(n):
                self.pin(self.env[source])
            return self.env[layer_inputs(n)[0]]
        if is_constant(n):
            self.unsettled.add(n)
            return self._of_constant(attribute(self.graph_module, n))
        if not is_layer(self.graph_module, n):
            return self._moved(n)
        self.layer = self.graph_module.get_submodule(str(n.target))
        inputs = [self.env[source] for source in layer_inputs(n)]
        if "shape" not in n.meta:
            raise AssertionError(f"{n} has several results")
        return self.settled(rule_of(self.layer)(self, self.layer, inputs, n.meta["shape"]))

    # --- moves --------------------------------------------------------------------------------------------------------

    def _moved(self, n: fx.Node) -> Any:
        sources = layer_inputs(n)
        constant = self.unsettled.issuperset(sources)
        found = self._run_move(n)
        if constant:
            self.unsettled.add(n)
            return found
        heads = _reaches_product(self.graph_module, n)
        if isinstance(found, Tensor):
            return self.settled(found, heads=heads)
        return tuple(self.settled(each, heads=heads) for each in found)

    def _run_move(self, n: fx.Node) -> Any:
        if n.op == "call_module" or n.target is torch.clone:  # a dropout
            return self.env[layer_inputs(n)[0]]
        given: Any = fx.node.map_arg((n.args, n.kwargs), self._operand)
        args, kwargs = given
        if n.target is F.pad or "pad" in getattr(n.target, "__name__", ""):
            return self._padded(n, args[0])
        assert callable(n.target)
        return n.target(*args, **kwargs)

    def _operand(self, node: fx.Node) -> Any:
        """The labels of a node; the values of constants that are places to take others from."""
        if is_constant(node) and not (value := attribute(self.graph_module, node)).is_floating_point():
            return value.cpu()
        return self.env[node]

    def _padded(self, n: fx.Node, labels: Tensor) -> Tensor:
        """What is beside an image belongs to its channel; new channels get new labels, which no tensor has."""
        shape, pad = n.meta["shape"], list(_pad_of(n))
        for axis in varying(labels) or range(1, 2 if labels.shape[1] == 1 else 1):
            place = 2 * (labels.ndim - 1 - axis)
            for at, end in enumerate(pad[place : place + 2]):
                if end > 0:
                    wide = [size if i != axis else end for i, size in enumerate(labels.shape)]
                    new = self.unions.fresh(end).view([-1 if i == axis else 1 for i in range(labels.ndim)])
                    labels = torch.cat([labels, new.expand(wide)][:: 1 if at else -1], axis)
                elif end < 0:
                    start = 0 if at else -end
                    labels = labels.narrow(axis, start, labels.shape[axis] + end)
        axes = varying(labels)
        return labels[tuple(slice(None) if i in axes else slice(0, 1) for i in range(labels.ndim))].expand(shape)

    # --- what rules act on --------------------------------------------------------------------------------------------

    def outputs(self, size: int) -> Tensor:
        """New labels for what a layer puts out, the same each time that it is called; one alone is pinned."""
        if self.layer not in self.made:
            self.made[self.layer] = self.unions.fresh(size) if size > 1 else torch.zeros(1, dtype=torch.int64)
        return self.made[self.layer]

    def attach(self, name: str, axis: int, labels: Tensor) -> None:
        """Ties an axis of a tensor of the layer, if it has that tensor; computed ones and others' sizes are pinned."""
        tensor = self._tensor(name)
        if tensor is None or tensor.ndim <= axis or tensor.shape[axis] != len(labels):
            if getattr(self.layer, name, None) is not None:
                self.pin(labels)
            return
        known = self.tied.setdefault((id(tensor), axis), labels)
        self.unions.unite(known, labels)

    def held(self, name: str) -> Tensor:
        """A label for each element of a tensor of the layer."""
        tensor = self._tensor(name)
        return torch.tensor(PINNED) if tensor is None else self._of_constant(tensor)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Joins the labels at the same places."""
        self.unions.unite(a, b)

    def pin(self, labels: Tensor) -> None:
        """Keeps all that has these labels."""
        self.unions.pin(labels)

    def counts(self, labels: Tensor) -> None:
        """Notes a mean, a deviation or a maximum over these: without one of them it is another one."""
        self.counted.append(narrowed(labels).flatten())
        self.sums(labels)

    def sums(self, labels: Tensor) -> None:
        """Notes that these are summed without weights: a product of activations, or all of a tensor."""
        self.summed.append(narrowed(labels).flatten())

    def settled(self, labels: Tensor, *, heads: bool = False) -> Tensor:
        """The roots of labels, joined until they vary along one axis at most; one label for all is pinned.

        The axis is that which leaves the most classes; with `heads` the one before the last that varies.
        """
        labels = self.unions.roots(labels)
        axes = varying(labels)
        if len(axes) > 1:
            keep = axes[-2] if heads else max(axes, key=lambda axis: count_roots(labels, axis))
            rows = narrowed(labels).movedim(keep, 0).flatten(1)
            self.unions.unite(rows, rows[:, :1])
            labels = self.unions.roots(labels)
            axes = varying(labels)
        if not axes and labels.numel():
            self.pin(narrowed(labels))
            return torch.tensor(PINNED).expand(labels.shape)
        return labels

    def _tensor(self, name: str) -> Tensor | None:
        own = {**self.layer._parameters, **self.layer._buffers}
        return own.get(name)

    def _of_constant(self, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.numel() < 2:
            return torch.tensor(PINNED).expand(value.shape)
        if id(value) not in self.elements:
            self.elements[id(value)] = self.unions.fresh(value.numel()).view(value.shape)
        return self.elements[id(value)]


def _pad_of(n: fx.Node) -> Sequence[int]:
    """The sizes of a pad, last axis first."""
    found = n.args[1] if len(n.args) > 1 else n.kwargs["pad"]
    assert isinstance(found, Sequence)
    return found  # type: ignore[return-value]


def _reaches_product(graph: Graph, node: fx.Node) -> bool:
    """Whether values are factors of a product of activations, as those of attention, before a layer with weights."""
    return any(isinstance(each, ops.MatMul) for each in _readers(graph, node, set()))


def _readers(graph: Graph, node: fx.Node, seen: set[fx.Node]) -> Iterator[nn.Module]:
    """The layers behind a node, up to those with weights or products."""
    for user in node.users:
        if user in seen or user.op == "output" or not user.meta["tensor"]:
            continue
        seen.add(user)
        module = graph.get_submodule(str(user.target)) if is_layer(graph, user) else None
        if module is not None:
            yield module
        if module is None or not layer_kind(module).accumulates:
            yield from _readers(graph, user, seen)
