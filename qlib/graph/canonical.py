"""Functional ops -> modules: ``F.relu`` becomes `nn.ReLU`, ``+`` becomes `ops.Add`, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function

from qlib.graph import ops
from qlib.graph.ir import Graph, attribute, is_constant

__all__ = ["canonical_module"]

Canonical = tuple[nn.Module, Sequence[fx.Node]]


def canonical_module(graph: Graph, node: fx.Node) -> Canonical:
    """A module that computes what the functional `node` computes, and the nodes that are its tensor inputs.

    An op without a module of its own becomes an `ops.Function`, computed in float.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    build = _BUILDERS.get(str(name).rstrip("_") if not str(name).startswith("_") else str(name))
    found = build(graph, node) if build is not None else None
    return found if found is not None else _function(graph, node)


def _tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and bool(value.meta["tensor"])


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that an op of one input works on, however it was passed."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) and bool(value.meta["tensor"]) else None


def _function(graph: Graph, node: fx.Node) -> Canonical:
    """An `ops.Function`; operands that the model holds become its buffers."""
    inputs: list[fx.Node] = []
    constants: list[Tensor] = []

    def slot(arg: fx.Node) -> Any:
        if is_constant(arg):
            constants.append(attribute(graph, arg))
            return ops.Function.Slot(-len(constants))
        inputs.append(arg)
        return ops.Function.Slot(len(inputs) - 1)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), slot)
    function: Callable[..., Any]
    if isinstance(node.target, str):
        function = getattr(torch.Tensor, node.target)
    else:
        assert callable(node.target)
        function = node.target
    return ops.Function(function, args, kwargs, constants), inputs


def _arguments(graph: Graph, node: fx.Node) -> dict[str, Any]:
    """The arguments of a function of torch or torch.nn.functional, by name."""
    found = (
        normalize_function(node.target, node.args, dict(node.kwargs), normalize_to_only_use_kwargs=True)
        if callable(node.target)
        else None
    )
    return dict(found.kwargs) if found is not None else dict(node.kwargs)


def _binary(make: Callable[[], nn.Module]) -> Callable[[Graph, fx.Node], Canonical | None]:
    def build(graph: Graph, node: fx.Node) -> Canonical | None:
        operands = node.args[:2]
        plain = len(operands) == 2 and all(map(_tensor, operands)) and not node.kwargs
        return (make(), operands) if plain else None  # type: ignore[return-value]

    return build


def _activation(make: Callable[[], nn.Module]) -> Callable[[Graph, fx.Node], Canonical | None]:
    def build(graph: Graph, node: fx.Node) -> Canonical | None:
        source = _source(node)
        return (make(), [source]) if source is not None else None

    return build


def _hardtanh(graph: Graph, node: fx.Node) -> Canonical | None:
    """Only the ReLU6 among them."""
    given = {**dict(zip(("input", "min_val", "max_val"), node.args, strict=False)), **node.kwargs}
    source = _source(node)
    return (nn.ReLU6(), [source]) if source and (given.get("min_val"), given.get("max_val")) == (0, 6) else None


def _cat(graph: Graph, node: fx.Node) -> Canonical | None:
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return (ops.Concat(int(dim)), list(tensors)) if isinstance(tensors, (list, tuple)) else None  # type: ignore[arg-type]


def _pool(make: type[nn.Module], *names: str) -> Callable[[Graph, fx.Node], Canonical | None]:
    def build(graph: Graph, node: fx.Node) -> Canonical | None:
        arguments = _arguments(graph, node)
        options = {name: arguments[name] for name in names if name in arguments}
        source = _source(node)
        if source is None or any(isinstance(v, fx.Node) for v in options.values()) or arguments.get("return_indices"):
            return None
        if "stride" in options and options["stride"] in ((), []):
            options["stride"] = None
        return make(**options), [source]

    return build


def _mean(graph: Graph, node: fx.Node) -> Canonical | None:
    """Mean over both spatial axes is a global average pool; other means stay functions."""
    names = ("input", "dim", "keepdim")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    dim, source = arguments.get("dim"), _source(node)
    if source is None or not isinstance(dim, (list, tuple)) or len(source.meta.get("shape", ())) != 4:
        return None
    if sorted(d % 4 for d in dim if isinstance(d, int)) != [2, 3]:
        return None
    return ops.GlobalAvgPool(keepdim=bool(arguments.get("keepdim", False))), [source]


def _softmax(graph: Graph, node: fx.Node) -> Canonical | None:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    source = _source(node)
    return (nn.Softmax(dim), [source]) if source is not None and isinstance(dim, int) else None


def _einsum(graph: Graph, node: fx.Node) -> Canonical | None:
    """``"..id,..jd->..ij"`` and ``"..ij,..jd->..id"`` are matrix products; other equations stay functions."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1:]
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(operands) != 2 or not out:
        return None
    (a, b), batch = terms, terms[0][:-2]
    if not a[:-2] == b[:-2] == out[:-2] == batch or len(set(a[-2:] + b[-2:])) != 3:
        return None
    if a[-1] == b[-1] and out[-2:] == a[-2] + b[-2]:
        return ops.MatMul(transpose=True), operands  # type: ignore[return-value]
    if a[-1] == b[-2] and out[-2:] == a[-2] + b[-1]:
        return ops.MatMul(), operands  # type: ignore[return-value]
    return None


def _linear(graph: Graph, node: fx.Node) -> Canonical | None:
    """``F.linear`` with the model's own weights."""
    arguments = _arguments(graph, node)
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if not isinstance(weight, fx.Node) or not is_constant(weight) or (bias is not None and not is_constant(bias)):
        return None
    value = attribute(graph, weight)
    module = nn.Linear(value.shape[1], value.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
    if bias is not None:
        value = attribute(graph, bias)
        module.bias = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
    return module, [arguments["input"]]


_BUILDERS: dict[str, Callable[[Graph, fx.Node], Canonical | None]] = {
    "add": _binary(ops.Add),
    "iadd": _binary(ops.Add),
    "mul": _binary(ops.Mul),
    "imul": _binary(ops.Mul),
    "multiply": _binary(ops.Mul),
    "matmul": _binary(ops.MatMul),
    "bmm": _binary(ops.MatMul),
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "relu": _activation(nn.ReLU),
    "relu6": _activation(nn.ReLU6),
    "hardtanh": _hardtanh,
    "sigmoid": _activation(nn.Sigmoid),
    "tanh": _activation(nn.Tanh),
    "silu": _activation(nn.SiLU),
    "hardswish": _activation(nn.Hardswish),
    "hardsigmoid": _activation(nn.Hardsigmoid),
    "softmax": _softmax,
    "_softmax": _softmax,
    "max_pool2d": _pool(nn.MaxPool2d, "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "boolean_dispatch": _pool(nn.MaxPool2d, "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": _pool(
        nn.AvgPool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    "adaptive_avg_pool2d": _pool(nn.AdaptiveAvgPool2d, "output_size"),
    "mean": _mean,
    "einsum": _einsum,
    "linear": _linear,
}
