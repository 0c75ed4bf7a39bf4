"""What a captured program may not compute: anything but float32, or numbers that only the images decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qlib.errors import ModelError
from qlib.graph.ir import source_line
from qlib.graph.names import op_of, owner_of
from qlib.graph.trace import depends_on

__all__ = ["refuse_values"]

_OTHER_FLOATS = (torch.float64, torch.float16, torch.bfloat16)


def refuse_values(graph: fx.Graph, images: fx.Node) -> None:
    """Raises ModelError, naming layer and line, for a node that depends on the images in a way no grid can hold."""
    depending = depends_on(graph, images)
    for node in graph.nodes:
        problem = _problem(node.meta.get("val")) if node in depending else ""
        if problem:
            raise ModelError(f"the model cannot be captured: {_named(node)} {problem}")


def _problem(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return next(filter(None, map(_problem, value)), "")
    if free_unbacked_symbols(value):
        return (
            "decides by the values of a tensor how much is computed, or makes a number of Python of them (item,"
            " nonzero, a mask as an index); rewrite it without"
        )
    if not isinstance(value, Tensor):
        return ""
    if value.dtype in _OTHER_FLOATS:
        return f"computes in {value.dtype}; drop the conversion, as all is float32 before it is quantized"
    if value.ndim == 0:
        return (
            "makes one number of a whole batch, so that each image changes the others' results; give the dimensions"
            " to reduce, without the first"
        )
    return ""


def _named(node: fx.Node) -> str:
    """The op, its layer and its line."""
    line, owner = source_line(node), owner_of(node)
    return repr(op_of(node)) + (f" in layer {owner!r}" if owner else "") + (f" at {line}" if line else "")
