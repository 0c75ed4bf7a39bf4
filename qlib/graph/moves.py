"""ATen ops that only move values, as functions of torch that take any layout in memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qlib.graph.aten import Arguments, arguments_of
from qlib.graph.names import op_of

__all__ = ["is_move", "move_of"]

Move = tuple[Callable[..., Any], tuple[Any, ...]]

_AS_THEY_ARE = """
    transpose getitem squeeze expand expand_as narrow movedim t repeat tile flip unfold
    repeat_interleave swapaxes swapdims index_select alias detach numpy_T reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
"""


def is_move(node: fx.Node, depending: Collection[fx.Node] | None = None) -> bool:
    """Whether an op only moves values, pads with zeros or with its own values, or joins parts of one tensor.

    `depending`: the nodes that depend on the images; without it, joining counts as no move.
    """
    op = op_of(node)
    if op in ("pad", "constant_pad_nd"):
        given = arguments_of(node)
        return given.get("mode", "constant") != "constant" or not given.get("value")
    if op == "cat":
        parts = arguments_of(node)["tensors"]
        sources = {_origin(part) for part in parts}
        return len(parts) > 1 and len(sources) == 1 and depending is not None and not sources - set(depending)
    if op == "getitem":  # one of several results
        return is_move(node.all_input_nodes[0])
    return op in _MOVES or op in _AS_THEY_ARE.split()


def _origin(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and is_move(node):
        node = node.all_input_nodes[0]
    return node


def move_of(node: fx.Node) -> Move | None:
    """The function that an op is, and its arguments, in the nodes of the program; None where the op itself will do.

    A view becomes a reshape: it fails where the layout in memory does not allow it, which channels_last may not.
    """
    rule = _MOVES.get(op_of(node))
    return rule(arguments_of(node)) if rule is not None else None


def _sizes(sizes: Any) -> list[Any]:
    """Where how many images there are is the one unknown of a shape, -1 stands for it."""
    unknown = [size for size in sizes if isinstance(size, fx.Node)]
    if len(unknown) == 1 and -1 not in [size for size in sizes if isinstance(size, int)]:
        return [-1 if isinstance(size, fx.Node) else size for size in sizes]
    return list(sizes)


def _reshape(given: Arguments) -> Move:
    return torch.reshape, (given["self"], _sizes(given.get("size", given.get("shape"))))


def _slice(given: Arguments) -> Move:
    start, end = given["start"], given["end"]
    end = None if isinstance(end, int) and end >= 2**62 else end
    part = slice(start, end, None if given["step"] == 1 else given["step"])
    dim = given["dim"]
    return operator.getitem, (
        given["self"],
        (*[slice(None)] * dim, part) if dim >= 0 else (..., part, *[slice(None)] * (-dim - 1)),
    )


def _index(given: Arguments) -> Move:
    return operator.getitem, (given["self"], tuple(slice(None) if each is None else each for each in given["indices"]))


def _same(function: Any, *names: str) -> Callable[[Arguments], Move]:
    return lambda given: (function, tuple(given[name] for name in names))


_MOVES: dict[str, Callable[[Arguments], Move]] = {
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "reshape_as": _same(torch.Tensor.reshape_as, "self", "other"),
    "view_as": _same(torch.Tensor.reshape_as, "self", "other"),
    "clone": _same(torch.clone, "self"),
    "contiguous": _same(torch.clone, "self"),
    "permute": _same(torch.permute, "self", "dims"),
    "flatten": _same(torch.flatten, "self", "start_dim", "end_dim"),
    "unsqueeze": _same(torch.unsqueeze, "self", "dim"),
    "unbind": _same(torch.unbind, "self", "dim"),
    "select": _same(torch.select, "self", "dim", "index"),
    "roll": _same(torch.roll, "self", "shifts", "dims"),
    "chunk": _same(torch.chunk, "self", "chunks", "dim"),
    "split": _same(torch.split, "self", "split_size", "dim"),
    "split_with_sizes": _same(torch.split, "self", "split_sizes", "dim"),
    "unflatten": _same(torch.unflatten, "self", "dim", "sizes"),
    "pad": _same(F.pad, "self", "pad", "mode"),
    "constant_pad_nd": _same(F.pad, "self", "pad"),
    "pixel_shuffle": _same(torch.pixel_shuffle, "self", "upscale_factor"),
    "pixel_unshuffle": _same(torch.pixel_unshuffle, "self", "downscale_factor"),
    "channel_shuffle": _same(torch.channel_shuffle, "self", "groups"),
    "cat": _same(torch.cat, "tensors", "dim"),
    "slice": _slice,
    "index": _index,
}
