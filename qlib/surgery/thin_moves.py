"""The sizes and places in the moves of a graph, changed to those of what is kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qlib.errors import ModelError
from qlib.graph.coordinates_unions import varying
from qlib.graph.ir import Graph, attribute, is_constant, layer_inputs, name_of

__all__ = ["kept_places", "thin_moves", "thinned"]

Labels = Tensor | Sequence[Tensor]
aten = torch.ops.aten


def kept_places(labels: Tensor, keep: Tensor, axis: int) -> Tensor:
    """The indices along an axis that stay."""
    return keep[_along(labels, axis)].nonzero().flatten()


def thinned(labels: Tensor, keep: Tensor) -> Tensor:
    """The labels of what stays."""
    for axis in varying(labels):
        labels = labels.index_select(axis, kept_places(labels, keep, axis))
    return labels


def _along(labels: Tensor, axis: int) -> Tensor:
    return labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))]


def thin_moves(graph: Graph, values: Mapping[str, Labels], keep: Tensor) -> None:
    """Changes, in place, the moves of a graph whose layers are thinned already.

    Law: each move, of the labels of what stays, gives the labels that stay of its output. One that has no form of its
    own for this becomes a gather along the axis.

    Raises:
        ModelError: a move has none.
    """
    mover = _Mover(graph, values, keep)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.meta["tensor"] and node.target is not torch.clone:
            mover.thin(node)
    graph.recompile()


class _Mover:
    def __init__(self, graph: Graph, values: Mapping[str, Labels], keep: Tensor) -> None:
        self.graph, self.values, self.keep = graph, values, keep
        self.moved: dict[fx.Node, Labels] = {}

    def thin(self, node: fx.Node) -> None:
        sources = layer_inputs(node)
        labels = [self.values[each.name] for each in (node, *sources)]
        parts = [part for each in labels for part in ([each] if isinstance(each, Tensor) else each)]
        if all(thinned(part, self.keep).shape == part.shape for part in parts):
            return
        wanted, before = self._thinned(labels[0]), (node.target, node.args, node.kwargs)
        rule = _RULES.get(node.target) or _RULES.get(getattr(node.target, "__name__", "").split(".")[0])
        if rule is not None:
            rule(self, node, wanted)
        if not self._gives(node, wanted):
            node.target, node.args, node.kwargs = before
            if not self._gather(node, wanted):
                raise ModelError(
                    f"{name_of(node)} cannot be thinned: it moves the values of channels that are kept apart"
                )

    def _thinned(self, labels: Labels) -> Labels:
        return thinned(labels, self.keep) if isinstance(labels, Tensor) else tuple(map(self._thinned, labels))  # type: ignore[arg-type]

    def _operand(self, node: fx.Node) -> Any:
        """What stands for a node where a move is tried: labels, places of a gather, or a number of images."""
        if not node.meta["tensor"]:
            return self._number(node)
        if is_constant(node):
            value = attribute(self.graph, node)
            if not value.is_floating_point():
                return value.cpu()
        return self._thinned(self.values[node.name])

    def _number(self, node: fx.Node) -> Any:
        assert callable(node.target)
        args: Any = fx.node.map_arg(node.args, self._operand)
        return node.target(*args)

    def _gives(self, node: fx.Node, wanted: Labels) -> bool:
        """Whether a move, as it is now, gives these labels; of a pad the shape tells."""
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), self._operand)
        try:
            found = node.target(*given[0], **given[1])  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError):
            return False
        if node.target in _PADS or "pad" in getattr(node.target, "__name__", ""):
            return isinstance(wanted, Tensor) and bool(found.shape == wanted.shape)
        pairs = zip(*([each] if isinstance(each, Tensor) else each for each in (found, wanted)), strict=True)
        return all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)

    # --- rules --------------------------------------------------------------------------------------------------------

    def reshape(self, node: fx.Node, wanted: Tensor) -> None:
        """Sizes that are numbers become those of what stays."""
        source, sizes = node.args[0], _numbers(node.args[1:])
        old = self._old(node).shape
        if len(sizes) == len(old):
            new = [
                int(wanted.shape[i]) if isinstance(size, int) and size == old[i] else size
                for i, size in enumerate(sizes)
            ]
            node.args = (source, new)

    def unflatten(self, node: fx.Node, wanted: Tensor) -> None:
        source, dim, sizes = node.args
        start = int(dim) % self._old(layer_inputs(node)[0]).ndim  # type: ignore[arg-type]
        node.args = (source, dim, [int(wanted.shape[start + i]) for i in range(len(sizes))])  # type: ignore[arg-type]

    def split(self, node: fx.Node, wanted: Sequence[Tensor]) -> None:
        """Parts may differ in size now, also those of a chunk."""
        dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        node.target, node.kwargs = torch.split, {}
        node.args = (node.args[0], [int(part.shape[dim]) for part in wanted], dim)

    def getitem(self, node: fx.Node, wanted: Tensor) -> None:
        """The part of the axis that varies, as a slice or, where it has gaps, as places to gather."""
        source = layer_inputs(node)[0]
        labels = self.values[source.name]
        if not isinstance(labels, Tensor):  # one of the parts of a split
            return
        index: Any = node.args[1]
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (labels.ndim - sum(each is not None for each in index) + 1)
        for axis in varying(labels):
            places = [i for i, each in enumerate(index) if each is not None]
            if axis < len(places):
                index[places[axis]] = self._part(node, labels, axis, index[places[axis]])
        node.args = (source, tuple(index))

    def narrow(self, node: fx.Node, wanted: Tensor) -> None:
        source, dim, start, length = node.args
        labels = self._old(layer_inputs(node)[0])
        axis = int(dim) % labels.ndim  # type: ignore[arg-type]
        if axis in varying(labels):
            part = self._part(node, labels, axis, slice(start, int(start) + int(length)))  # type: ignore[arg-type]
            assert isinstance(part, slice)
            node.args = (source, dim, part.start, part.stop - part.start)

    def index_select(self, node: fx.Node, wanted: Tensor) -> None:
        """Other places along the axis that varies."""
        source, dim, index = node.args
        labels = self._old(layer_inputs(node)[0])
        axis = int(dim) % labels.ndim  # type: ignore[arg-type]
        if axis in varying(labels):
            part = self._part(node, labels, axis, index)
            ends = (part.start, part.stop) if isinstance(part, slice) else None
            node.args = (source, dim, part if ends is None else self._constant(node, torch.arange(*ends)))

    def _part(self, node: fx.Node, labels: Tensor, axis: int, part: Any) -> Any:
        """An index into what stays for one into all of an axis."""
        if isinstance(part, fx.Node):
            if not is_constant(part):
                return part
            part = attribute(self.graph, part).cpu()
            part = part.nonzero().flatten() if part.dtype == torch.bool else part
        elif not isinstance(part, slice):
            return part
        size = labels.shape[axis]
        stay = self.keep[_along(labels, axis)]
        taken = torch.arange(size)[part]
        places = (stay.cumsum(0) - 1)[taken[stay[taken]]]
        if len(places) and bool((places.diff() == 1).all()):
            return slice(int(places[0]), int(places[-1]) + 1)
        return self._constant(node, places)

    def pad(self, node: fx.Node, wanted: Tensor) -> None:
        """Beside the channels stand as many new ones as stay of them."""
        source = layer_inputs(node)[0]
        labels, pad = self._old(source), list(_numbers([node.args[1]]))
        for axis in varying(self._old(node)):
            place = 2 * (labels.ndim - 1 - axis)
            before, after = (pad[place], pad[place + 1]) if place < len(pad) else (0, 0)
            stay = self.keep[_along(self._old(node), axis)]
            kept = self.keep[_along(labels, axis)] if axis in varying(labels) else torch.ones(labels.shape[axis]).bool()
            if place < len(pad):
                pad[place] = int(stay[:before].sum()) if before >= 0 else -int(kept[:-before].sum())
                end = len(stay) - after
                pad[place + 1] = int(stay[end:].sum()) if after >= 0 else -int(kept[after:].sum())
        node.args = (node.args[0], pad, *node.args[2:])

    # --- the last resort ----------------------------------------------------------------------------------------------

    def _gather(self, node: fx.Node, wanted: Labels) -> bool:
        """Replaces a move by the choice of places along the axis, where it moves nothing else."""
        (source, *others), old = layer_inputs(node), self.values[node.name]
        before = self._old(source)
        if others or not isinstance(old, Tensor) or not isinstance(wanted, Tensor) or before.ndim != old.ndim:
            return False
        axes = varying(before)
        if len(axes) != 1 or varying(old) not in (axes, []):
            return False
        axis = axes[0]
        shape = [-1 if i == axis else 1 for i in range(before.ndim)]
        places = torch.arange(before.shape[axis]).view(shape).expand(before.shape)
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: places if each is source else None)
        moved = node.target(*given[0], **given[1])  # type: ignore[operator]
        order = _along(moved, axis)
        others_same = [a == b for i, (a, b) in enumerate(zip(before.shape, moved.shape, strict=True)) if i != axis]
        if not all(others_same) or not bool((moved == order.view(shape)).all()):
            return False
        stay = self.keep[_along(before, axis)]
        order = (stay.cumsum(0) - 1)[order[stay[order]]]
        node.target, node.kwargs = torch.ops.aten.index_select.default, {}
        node.args = (source, axis, self._constant(node, order))
        return self._gives(node, wanted)

    def _constant(self, node: fx.Node, value: Tensor) -> fx.Node:
        name = f"places_{node.name}"  # thinned again, it is replaced
        self.graph.register_buffer(name, value.to(next(self.graph.parameters()).device))
        with self.graph.graph.inserting_before(node):
            made = self.graph.graph.get_attr(name)
        made.meta = {"name": name, "tensor": True, "shape": tuple(value.shape), "dtype": value.dtype}
        return made

    def _old(self, node: fx.Node) -> Tensor:
        labels = self.values[node.name]
        assert isinstance(labels, Tensor)
        return labels


def _numbers(args: Sequence[Any]) -> list[Any]:
    """Sizes, given one by one or as a list."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (list, tuple)) else list(args)


_PADS = (F.pad,)

_RULES: dict[Any, Callable[..., None]] = {
    torch.reshape: _Mover.reshape,
    torch.unflatten: _Mover.unflatten,
    torch.chunk: _Mover.split,
    torch.split: _Mover.split,
    operator.getitem: _Mover.getitem,
    F.pad: _Mover.pad,
    "expand": _Mover.reshape,
    "narrow": _Mover.narrow,
    "index_select": _Mover.index_select,
}
"""The function of a move, or the name of its op -> what changes its arguments; others have no sizes in them."""
