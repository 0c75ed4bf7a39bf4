"""Writes into a part of a tensor, as what they are: the parts before it, the new one, the parts after it."""

from __future__ import annotations

import torch
from torch import fx

from qlib.graph.aten import arguments_of
from qlib.graph.edit import insert
from qlib.graph.names import op_of, writes

__all__ = ["split_scatter"]

aten = torch.ops.aten


def split_scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Writes an op that replaces a part of a tensor as a concatenation, or as the new values where they are all."""
    rule = _RULES.get(op_of(node)) if not writes(node) else None
    made = rule(graph, node) if rule is not None else None
    if made is not None:
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The values of another tensor, in the place of all."""
    given = arguments_of(node)
    source, value = given["src"], node.meta["val"]
    new = source.meta["val"]
    same: bool = new.dtype == value.dtype and list(new.shape) == list(value.shape)
    return source if same else None


def _scattered(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = arguments_of(node)
    source, dim = given["src"], given["dim"]
    size = node.meta["val"].shape[dim]
    if op_of(node) == "select_scatter":
        start, step = given["index"], 1
        end: object = start + 1 if isinstance(start, int) and start != -1 else None
        source = insert(graph, node, aten.unsqueeze.default, source, dim)
    else:
        start, end, step = given["start"] or 0, given["end"], given["step"]
    if start == 0 and step == 1 and (end is None or end is size or (isinstance(end, int) and end >= 2**62)):
        return source if isinstance(source, fx.Node) else None
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(end, (int, type(None))) or step != 1:
        return None
    start, end, _ = slice(start, end).indices(size)
    parts = [insert(graph, node, aten.slice.Tensor, given["self"], dim, 0, start)] if start else []
    parts.append(source)
    if end < size:
        parts.append(insert(graph, node, aten.slice.Tensor, given["self"], dim, end, size))
    return insert(graph, node, aten.cat.default, parts, dim) if len(parts) > 1 else source


_RULES = {"copy": _copied, "slice_scatter": _scattered, "select_scatter": _scattered}
