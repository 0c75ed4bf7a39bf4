"""Programs that were exported for a fixed number of images, made programs for any number."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qlib.errors import ModelError

__all__ = ["images_of", "is_fixed", "number_of", "with_any_batch"]


def is_fixed(size: Any) -> bool:
    """Whether a dimension is the same for any number of images."""
    return isinstance(size, int) or not size.node.expr.free_symbols


def number_of(size: Any, more: Any, batch: int) -> int:
    """A size for `batch` images; `more` is that for three, where `size` is known for two alone, or None.

    >>> number_of(8, 12, 5), number_of(8, None, 5)
    (20, 8)
    """
    if is_fixed(size):
        return int(size) if more is None else int(size) + (int(more) - int(size)) * (batch - 2)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def images_of(program: ExportedProgram) -> fx.Node:
    """The placeholder of the batch of images, the only input of a program."""
    (name,) = program.graph_signature.user_inputs
    (images,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == name)
    assert isinstance(images, fx.Node)
    return images


def with_any_batch(two: ExportedProgram, three: ExportedProgram) -> ExportedProgram:
    """A program for two images made one for any number of them, by comparison with that for three.

    Models that ask for ``len(x)`` or ``int(x.shape[0])`` are exported for one number of images; where a number in the
    program follows it as ``a * batch + b``, this is written instead. The meta value `more` is that of three images.

    Raises:
        ModelError: the programs differ in more than such numbers.
    """
    refused = ModelError(
        "the model cannot be captured: what it computes depends on how many images are in a batch; rewrite the forward"
        " method so that it does not"
    )
    images, graph = images_of(two), two.graph
    with graph.inserting_after(images):
        count = graph.call_function(torch.ops.aten.sym_size.int, (images, 0))
    count.meta |= {"val": 2, "more": 3}

    def general(mine: Any, theirs: Any, place: fx.Node) -> Any:
        if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(mine) == len(theirs):
            return [general(a, b, place) for a, b in zip(mine, theirs, strict=True)]
        if isinstance(mine, float) and mine != theirs:
            raise refused
        if type(mine) is not int or type(theirs) is not int or mine == theirs:
            return mine
        factor, rest = theirs - mine, mine - 2 * (theirs - mine)
        with graph.inserting_before(place):
            found = count if factor == 1 else _number(graph, operator.mul, count, factor)
            return found if rest == 0 else _number(graph, operator.add, found, rest)

    mine = [node for node in graph.nodes if node is not count]
    theirs = list(three.graph.nodes)
    if [(node.op, str(node.target)) for node in mine] != [(node.op, str(node.target)) for node in theirs]:
        raise refused
    for node, other in zip(mine, theirs, strict=True):
        node.meta["more"] = other.meta.get("val")
        if node.op == "call_function":
            node.args = tuple(general(a, b, node) for a, b in zip(node.args, other.args, strict=True))
    return two


def _number(graph: fx.Graph, function: Any, *args: Any) -> fx.Node:
    node = graph.call_function(function, args)
    for key in ("val", "more"):
        node.meta[key] = function(*fx.node.map_arg(args, lambda each: each.meta[key]))  # noqa: B023
    return node
