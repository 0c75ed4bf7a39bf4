"""Constants of an exported program: tensors of one number, and what is 1 whatever the images are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qlib.graph.aten import arguments_of
from qlib.graph.edit import insert
from qlib.graph.names import op_of, writes

__all__ = ["make_constant", "merge_equal", "settle_softmax"]

aten = torch.ops.aten

_FACTORIES: dict[str, int | None] = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), 0),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), 1),
    **dict.fromkeys(("full", "new_full", "full_like", "fill"), None),
}
"""Ops that make a tensor of one number: that number, or None where the op is given it."""


def make_constant(graph: fx.Graph, node: fx.Node) -> None:
    """A tensor of one number that takes only type and sizes from others: a constant, repeated for each image."""
    op = op_of(node)
    if op not in _FACTORIES or writes(node) or not node.all_input_nodes:
        return
    given, like = arguments_of(node), node.meta["val"]
    value = _FACTORIES[op] if _FACTORIES[op] is not None else given.get("fill_value", given.get("value"))
    sizes = given["size"] if "size" in given else _asked_sizes(graph, node)
    unknown = [isinstance(size, fx.Node) for size in sizes]
    if not isinstance(value, (int, float)):
        return
    one = [1 if each else size for each, size in zip(unknown, sizes, strict=True)]
    made = insert(graph, node, aten.full.default, one, value, dtype=like.dtype, device=like.device)
    times = [size if each else 1 for each, size in zip(unknown, sizes, strict=True)]
    node.replace_all_uses_with(insert(graph, node, aten.repeat.default, made, times) if any(unknown) else made)
    graph.erase_node(node)


def merge_equal(graph: fx.Graph) -> None:
    """Constants that are made twice, as both states of an LSTM are, are made once, unless one is changed in place.

    So are the sizes that they have: the exporter merges what is equal, and verification misses what it merged.
    """
    made: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if op_of(node) in ("full", "repeat") or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            first = made.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node and not any(map(writes, (*first.users, *node.users))):
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _asked_sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """The sizes of a tensor, as numbers and, where the images decide them, as nodes."""
    source, value = node.all_input_nodes[0], node.meta["val"]
    more = node.meta.get("more", value)
    return [
        int(size) if isinstance(size, int) and size == other else insert(graph, node, aten.sym_size.int, source, axis)
        for axis, (size, other) in enumerate(zip(value.shape, more.shape, strict=True))
    ]


def softmax_of_images(x: Tensor, dim: int) -> Tensor:
    """A softmax in operators that no integer kernel stands for.

    >>> softmax_of_images(torch.tensor([[0.0], [0.0]]), 1).flatten().tolist()
    [1.0, 1.0]
    """
    return torch.log_softmax(x, dim).exp()


def settle_softmax(graph: fx.Graph, node: fx.Node) -> None:
    """A softmax over one element is 1; one over the images of a batch, which may be one, computes in float.

    The integer kernel of ONNX Runtime gives 0 for one element: its product overflows.
    """
    axis = arguments_of(node)["dim"]
    sizes = [value.shape[axis] for value in _values(node)]
    if any(size != sizes[0] or not isinstance(size, int) for size in sizes):
        node.replace_all_uses_with(insert(graph, node, softmax_of_images, arguments_of(node)["self"], axis))
        graph.erase_node(node)
    elif sizes[0] == 1:
        _drop_softmax(graph, node)


def _drop_softmax(graph: fx.Graph, node: fx.Node) -> None:
    """The product of weights that are 1 with the one value is that value."""
    for user in list(node.users):
        value = user.args[1] if op_of(user) == "matmul" and user.args[0] is node else None
        if isinstance(value, fx.Node) and _outer(value) == _outer(user) and user.meta["val"].ndim > 1:
            sizes = [-1] * user.meta["val"].ndim
            sizes[-2] = user.meta["val"].shape[-2]
            each = value if sizes[-2] == 1 else insert(graph, user, aten.expand.default, value, sizes)
            user.replace_all_uses_with(each)
            graph.erase_node(user)
    if node.users:
        ones = insert(graph, node, aten.ones_like.default, node.args[0])
        node.replace_all_uses_with(ones)
        make_constant(graph, ones)


def _values(node: fx.Node) -> list[Tensor]:
    """What a node gives for two images, or any number of them, and for three."""
    return [node.meta[key] for key in ("val", "more") if key in node.meta]


def _outer(node: fx.Node) -> list[tuple[int, torch.Size]]:
    """How many axes the matrices of a node have with those around them, and the sizes of these."""
    return [(value.ndim, value.shape[:-2]) for value in _values(node)]
