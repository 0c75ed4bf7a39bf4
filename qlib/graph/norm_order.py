"""Batch-norms that read what a layer computes through moves are put between the layer and the moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qlib.graph.any_batch import number_of
from qlib.graph.aten import arguments_of
from qlib.graph.edit import insert_like, sizes_of
from qlib.graph.moves import is_move
from qlib.graph.names import op_of

__all__ = ["norm_before_moves"]

aten = torch.ops.aten

_CHANNELS = {"linear": -1, **{f"conv{end}": 1 for end in ("1d", "2d", "3d")}}
_CHANNELS |= {f"conv_transpose{end}": 1 for end in ("1d", "2d", "3d")}
"""Layers that take in a batch-norm, and the axis of their output that has its channels."""


@dataclass(frozen=True)
class _Moved:
    """A layer, the moves of its output, in order, and the batch-norm that alone reads them."""

    layer: fx.Node
    moves: tuple[fx.Node, ...]
    norm: fx.Node


def norm_before_moves(graph: fx.Graph, norm: fx.Node) -> None:
    """``norm(move(layer(x)))`` as ``move(norm(layer(x)))``, where the moves leave each channel what it is.

    A linear layer, whose channels are on the last axis, is then given rows: batch-norms want theirs on the second.
    """
    found = _moved(norm)
    if found is None or not _same_channels(found):
        return
    if op_of(found.layer) != "linear":
        _put_after(graph, found, _norm_of(graph, found, found.layer, found.moves[0]))
        return
    sizes = sizes_of(found.layer)
    if sizes is not None:
        first, given = found.moves[0], arguments_of(found.layer)
        rows = insert_like(graph, found.layer, first, aten.reshape.default, given["input"], [-1, _width(given)])
        layer = insert_like(graph, found.layer, first, aten.linear.default, rows, given["weight"], given["bias"])
        norm = _norm_of(graph, found, layer, first)
        _put_after(graph, found, insert_like(graph, found.norm, first, aten.reshape.default, norm, sizes))
        graph.erase_node(found.layer)


def _moved(norm: fx.Node) -> _Moved | None:
    moves: list[fx.Node] = []
    given = arguments_of(norm)
    source, *weights = (given[name] for name in ("input", "running_mean", "running_var", "weight", "bias"))
    while is_move(source) and len(source.users) == 1:
        moves.insert(0, source)
        source = source.all_input_nodes[0]
    known = all(weight is None or weight.op == "placeholder" for weight in weights) and weights[0] is not None
    if not moves or not known or op_of(source) not in _CHANNELS or len(source.users) > 1:
        return None
    return _Moved(source, tuple(moves), norm)


def _same_channels(found: _Moved) -> bool:
    """Whether the moves, done to the numbers of the channels, give the batch-norm each channel's where it is."""
    shape = _shape(found.layer)
    axis = _CHANNELS[op_of(found.layer)] % len(shape)
    moved: Any = torch.arange(1, shape[axis] + 1).view([-1 if at == axis else 1 for at in range(len(shape))])
    values: dict[fx.Node, Any] = {found.layer: moved.expand(shape).clone()}
    for node in found.moves:
        for source in node.all_input_nodes:
            if source in values:
                continue
            if isinstance(source.meta["val"], torch.Tensor):
                return False
            values[source] = number_of(source.meta["val"], source.meta.get("more"), 2)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = moved = node.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(moved, torch.Tensor) or moved.numel() != values[found.layer].numel():
        return False
    expected = torch.arange(1, shape[axis] + 1).view(-1, *[1] * (moved.ndim - 2))
    return moved.shape[1] == shape[axis] and bool((moved == expected).all())


def _shape(node: fx.Node) -> list[int]:
    """The shape of a tensor for two images."""
    sizes = node.meta["val"].shape
    more = node.meta["more"].shape if "more" in node.meta else [None] * len(sizes)
    return [number_of(size, other, 2) for size, other in zip(sizes, more, strict=True)]


def _width(linear: dict[str, Any]) -> int:
    return int(linear["weight"].meta["val"].shape[1])


def _norm_of(graph: fx.Graph, found: _Moved, source: fx.Node, place: fx.Node) -> fx.Node:
    return insert_like(graph, found.norm, place, found.norm.target, source, *found.norm.args[1:])


def _put_after(graph: fx.Graph, found: _Moved, normed: fx.Node) -> None:
    first, last = found.moves[0], found.moves[-1]
    first.replace_input_with(found.layer, normed)
    found.norm.replace_all_uses_with(last)
    graph.erase_node(found.norm)
