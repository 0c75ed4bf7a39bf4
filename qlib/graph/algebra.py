"""Passes over a graph of modules: factors and masks join the layers that can take them in."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qlib.graph import ops
from qlib.graph.ir import Graph, attribute, is_constant, is_layer, is_move, layer_inputs

__all__ = ["join_factors", "join_masks"]

_MASKED = -30.0
"""What is added to mask a score: exp(-30) is below the resolution of float32 beside 1."""


def join_factors(graph: Graph) -> None:
    """A tensor times a number is a factor of the products and sums that alone read it, or of the product that gives it.

    As ``(q * s) @ k`` and ``(q @ k) * s``, which attention has, and ``x + 0.1 * y``, which residual blocks have.
    """
    for node in list(graph.graph.nodes):
        factor = _factor(graph, node)
        if factor is None:
            continue
        producer = _only_producer(graph, node)
        readers = [(_module(graph, reader), index) for reader, index in _readers(graph, node)]
        if factor == 1.0:
            pass
        elif producer is not None and not all(isinstance(module, ops.MatMul) for module, _ in readers):
            producer.alpha *= factor
        elif readers and all(isinstance(module, (*_PRODUCTS, ops.Add)) for module, _ in readers):
            for module, index in readers:
                _multiply(module, index, factor)
        else:
            continue
        node.replace_all_uses_with(layer_inputs(node)[0])
        graph.graph.erase_node(node)


_PRODUCTS = (ops.MatMul, ops.Mul)


def _multiply(module: nn.Module | None, index: int, factor: float) -> None:
    """Multiplies one input of a product or a sum."""
    if isinstance(module, _PRODUCTS):
        module.alpha *= factor
    elif isinstance(module, ops.Add):
        alpha, beta = module.factors
        module.factors = (alpha * factor, beta) if index == 0 else (alpha, beta * factor)


def _only_producer(graph: Graph, node: fx.Node) -> ops.MatMul | ops.Mul | None:
    """The product whose values a node alone reads, directly or moved."""
    source = layer_inputs(node)[0]
    while is_move(graph, source) and len(source.users) == 1:
        source = layer_inputs(source)[0]
    module = _module(graph, source)
    return module if isinstance(module, _PRODUCTS) and len(source.users) == 1 else None


def _module(graph: Graph, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


_TIMES = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
_BY = (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)


def _factor(graph: Graph, node: fx.Node) -> float | None:
    """The positive number that a node multiplies its input with; scales have no sign."""
    module = _module(graph, node)
    if not isinstance(module, ops.Function) or module.function not in (*_TIMES, *_BY):
        return None
    value = module.args[1]
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        return None
    return float(value) if module.function in _TIMES else 1 / float(value)


def _readers(graph: Graph, node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The layers that read a tensor, directly or moved, and as which of their inputs."""
    found: list[tuple[fx.Node, int]] = []
    for user in node.users:
        if user.op != "output" and is_move(graph, user):
            found += _readers(graph, user)
        else:
            found += [(user, index) for index, source in enumerate(layer_inputs(user)) if source is node]
    return found


def join_masks(graph: Graph) -> None:
    """A constant of zeros and large negative numbers, added before a softmax, is a mask of that softmax."""
    for node in list(graph.graph.nodes):
        module = _module(graph, node)
        if isinstance(module, nn.Softmax) and (added := _added_mask(graph, layer_inputs(node)[0])):
            add, scores, mask = added
            shape = None if add.meta["shape"] == node.meta["shape"] else add.meta["shape"][1:]
            assert module.dim is not None
            graph.add_submodule(str(node.target), ops.MaskedSoftmax(mask, module.dim, shape).eval())
            add.replace_all_uses_with(scores)
            graph.graph.erase_node(add)


def _added_mask(graph: Graph, source: fx.Node) -> tuple[fx.Node, fx.Node, Tensor] | None:
    """The addition, the scores and the mask that a softmax reads, through moves."""
    while source.target is torch.reshape and len(source.users) == 1:
        source = layer_inputs(source)[0]
    adding = _module(graph, source)
    if not isinstance(adding, ops.Add) or len(source.users) != 1 or not is_layer(graph, source):
        return None
    if adding.factors != (1.0, 1.0):
        return None
    scores, mask = layer_inputs(source)
    if is_constant(scores):
        scores, mask = mask, scores
    if not is_constant(mask):
        return None
    value = attribute(graph, mask)
    masks = bool(((value == 0) | (value <= _MASKED)).all()) and bool((value < 0).any())
    return (source, scores, value) if masks else None
