"""Matrix products in other spellings: sums over indices, and products with something added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qlib.graph.aten import arguments_of, is_plain_product
from qlib.graph.edit import insert
from qlib.graph.names import op_of

__all__ = ["split_product"]

aten = torch.ops.aten


def split_product(graph: fx.Graph, node: fx.Node) -> None:
    """Writes an op as a matrix product, between moves; what it is not stays as it is."""
    rule = _RULES.get(op_of(node))
    made = rule(graph, node) if rule is not None else None
    if made is not None:
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _einsum(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``"byhwc,hkc->byhwk"``: the axes of both and of the result side by side, then free ones, then those summed."""
    given = arguments_of(node)
    terms = _terms(given["equation"], [each.meta["val"].ndim for each in given["tensors"]])
    if terms is None or is_plain_product(given["equation"]):
        return None
    a, b, out = terms
    both = [axis for axis in a if axis in b and axis in out]
    inner = [axis for axis in a if axis in b and axis not in out]
    left, right = ([axis for axis in term if axis not in (*both, *inner)] for term in (a, b))
    if set(out) != {*both, *left, *right}:
        return None  # an axis of one of them alone is summed
    first, second = given["tensors"]
    sizes = {**_sizes(b, second), **_sizes(a, first)}
    shape = _known([sizes[axis] for axis in (*both, *left, *right)])
    first = _arranged(graph, node, first, a, (both, left, inner), sizes)
    second = _arranged(graph, node, second, b, (both, inner, right), sizes)
    if first is None or second is None or shape is None:
        return None
    # With nothing to sum these are a column and a row.
    target = aten.matmul.default if inner else aten.mul.Tensor
    whole = insert(graph, node, aten.reshape.default, insert(graph, node, target, first, second), shape)
    return _permuted(graph, node, whole, (*both, *left, *right), out)


def _terms(equation: str, ndims: Sequence[int]) -> tuple[str, str, str] | None:
    """The axes of both operands and of the result, each a letter; None for what is no sum over two operands."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not arrow:
        return None
    spare = iter("ΑΒΓΔΕΖΗΘ")
    dots = max(ndim - len(term.replace("...", "")) for term, ndim in zip(terms, ndims, strict=True))
    names = "".join(next(spare) for _ in range(dots)) if "..." in equation else ""
    found = []
    for term, ndim in zip((*terms, out), (*ndims, None), strict=True):
        hidden = len(names) if ndim is None else ndim - len(term.replace("...", ""))
        term = term.replace("...", names[len(names) - hidden :]) if "..." in term else term
        if len(set(term)) != len(term):
            return None  # a diagonal
        found.append(term)
    return found[0], found[1], found[2]


def _sizes(term: str, tensor: fx.Node) -> dict[str, Any]:
    """Axis -> its size, None where the number of images decides it."""
    sizes = tensor.meta["val"].shape
    more = tensor.meta["more"].shape if "more" in tensor.meta else sizes
    known = [size if isinstance(size, int) and size == other else None for size, other in zip(sizes, more, strict=True)]
    return dict(zip(term, known, strict=True))


def _arranged(
    graph: fx.Graph,
    node: fx.Node,
    tensor: fx.Node,
    term: str,
    groups: tuple[list[str], list[str], list[str]],
    sizes: dict[str, Any],
) -> fx.Node | None:
    """An operand with the axes of the first group as they are, and one axis for each of the other two."""
    both, rows, columns = groups
    if any(size != 1 and size != sizes[axis] for axis, size in _sizes(term, tensor).items()):
        return None
    if any(size == 1 and sizes[axis] != 1 for axis, size in _sizes(term, tensor).items()):
        return None  # broadcast
    tensor = _permuted(graph, node, tensor, term, (*both, *rows, *columns))
    if len(rows) == len(columns) == 1:
        return tensor
    shape = _known([*(sizes[axis] for axis in both), _product(rows, sizes), _product(columns, sizes)])
    return None if shape is None else insert(graph, node, aten.reshape.default, tensor, shape)


def _product(axes: Sequence[str], sizes: dict[str, Any]) -> int | None:
    found = 1
    for axis in axes:
        if sizes[axis] is None:
            return None
        found *= sizes[axis]
    return found


def _known(sizes: list[int | None]) -> list[int] | None:
    """Sizes for a reshape, which finds one that is not known; None for more."""
    return None if sizes.count(None) > 1 else [-1 if size is None else size for size in sizes]


def _permuted(graph: fx.Graph, node: fx.Node, tensor: fx.Node, have: Sequence[str], want: Sequence[str]) -> fx.Node:
    order = [list(have).index(axis) for axis in want]
    return tensor if order == sorted(order) else insert(graph, node, aten.permute.default, tensor, order)


def _added(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``beta * c + alpha * (a @ b)``."""
    given = arguments_of(node)
    c, *pair = (value for value in given.values() if isinstance(value, fx.Node))
    product = insert(graph, node, aten.matmul.default, *pair)
    if given["alpha"] != 1:
        product = insert(graph, node, aten.mul.Tensor, product, given["alpha"])
    if given["beta"] == 0:
        return product
    if given["beta"] != 1:
        c = insert(graph, node, aten.mul.Tensor, c, given["beta"])
    return insert(graph, node, aten.add.Tensor, product, c)


_RULES = {"einsum": _einsum, "addmm": _added, "baddbmm": _added}
