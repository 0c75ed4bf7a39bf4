"""The kernels that ONNX Runtime runs, layer by layer, read from the graph that it optimized."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx, nn

from qlib.deploy.session import open_session
from qlib.files import scratch_folder
from qlib.graph.kinds import layer_kind

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

__all__ = ["CLAMPS", "MOVES", "QDQ_NODES", "Kernels", "exact_layers", "kernels_of", "layer_of", "open_with_graph"]

_MOVE_NAMES = (
    "Transpose Reshape Identity Squeeze Unsqueeze Flatten Slice Split Gather Expand Tile Shape Size Cast Pad"
    " DepthToSpace SpaceToDepth ReorderInput ReorderOutput"
)
MOVES = frozenset(_MOVE_NAMES.split())
"""Operators that compute no values."""

CLAMPS = frozenset({"Clip", "Max", "Min"})
"""Operators that keep codes within bounds tighter than their type's."""

QDQ_NODES = ("QuantizeLinear", "DequantizeLinear")
"""Operators between codes and floats."""

_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")
"""How the names of operators begin that compute in integers whatever type leaves them."""


@dataclass(frozen=True)
class Kernels:
    """The operators that compute one layer, in execution order; `integer` where none of them computes in float.

    Moves of data are left out. A layer of which nothing else remains has the quantize and dequantize steps, if any.
    """

    operators: tuple[str, ...] = ()
    integer: bool = True

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(self.operators))


def exact_layers(exact: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """The nodes of an exact model that compute values, and their modules, in execution order."""
    for node in exact.graph.nodes:
        if node.op == "call_module":
            module = exact.get_submodule(str(node.target))
            if not layer_kind(module).moves:
                yield node, module


def open_with_graph(model: Path) -> tuple[ort.InferenceSession, onnx.GraphProto]:
    """A session on a file, and the optimized graph that it runs (without the values of large tensors)."""
    import onnx

    with scratch_folder() as folder:
        optimized = folder / "optimized.onnx"
        session = open_session(model, optimized=optimized)
        return session, onnx.load(optimized, load_external_data=False).graph


def kernels_of(graph: onnx.GraphProto, layers: Collection[str]) -> dict[str, Kernels]:
    """The kernels of each layer that has nodes of its own in an optimized graph."""
    from onnx import TensorProto

    types = _element_types(graph)
    real = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    floats = {name for name, kind in types.items() if kind in real}
    computing: dict[str, list[str]] = {}
    qdq_nodes: dict[str, list[str]] = {}
    in_float: set[str] = set()
    for node, layer in zip(graph.node, _owners(graph, frozenset(layers), floats), strict=True):
        kinds = {types.get(name, TensorProto.UNDEFINED) for name in node.output if name}
        if layer is None or kinds <= {TensorProto.INT64, TensorProto.BOOL}:
            continue
        if node.op_type in QDQ_NODES:
            qdq_nodes.setdefault(layer, []).append(node.op_type)
        elif node.op_type not in MOVES:
            computing.setdefault(layer, []).append(node.op_type)
            if not node.op_type.startswith(_INTEGER) and not floats.isdisjoint(node.output):
                in_float.add(layer)
    return {
        layer: Kernels((*_shown(qdq_nodes.get(layer, []), computing.get(layer, [])),), layer not in in_float)
        for layer in dict.fromkeys([*computing, *qdq_nodes])
    }


def _shown(qdq_nodes: list[str], computing: list[str]) -> list[str]:
    """The operators of a layer: its quantize steps only where nothing but a clamp of the codes is left beside them."""
    return computing if set(computing) - CLAMPS else [*qdq_nodes, *computing]


def _owners(graph: onnx.GraphProto, layers: frozenset[str], floats: Collection[str]) -> list[str | None]:
    """The layer of each node: from its name, from the name of what it computes, or that of the node that uses it.

    Nodes keep the exporter's names through fusions, with something appended. Those that ONNX Runtime makes from the
    body of a function (hard-swish, ...) have none, those whose channels it groups are named after what they compute.
    What has no layer and computes codes only moves them.
    """
    users: dict[str, int] = {}
    for index in reversed(range(len(graph.node))):
        for name in graph.node[index].input:
            users[name] = index  # the first one in the end
    owners: list[str | None] = [None] * len(graph.node)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        named = (node.name, node.name.removesuffix("_nchwc") + "/", *node.output, *(f"{name}/" for name in node.output))
        owners[index] = next((layer for layer in (layer_of(name, layers) for name in named) if layer), None)
        if owners[index] is None and node.output[0] in users and node.output[0] in floats:
            owners[index] = owners[users[node.output[0]]]
    return owners


def layer_of(name: str, layers: frozenset[str]) -> str | None:
    """The longest layer name that begins `name` before a slash."""
    parts = name.split("/")
    starts = ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((start for start in starts if start in layers), None)


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """The element type of each tensor; optimized graphs tell those of some only."""
    from onnx import TensorProto

    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        inputs = [types.get(name, TensorProto.UNDEFINED) for name in node.input]
        if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat"):
            found = TensorProto.FLOAT
        elif node.op_type == "QuantizeLinear":
            found = inputs[2] if len(inputs) > 2 else TensorProto.UINT8
        elif node.op_type in ("Shape", "Size"):
            found = TensorProto.INT64
        elif node.op_type == "Cast":
            found = next(each.i for each in node.attribute if each.name == "to")
        elif node.op_type in ("QLinearConcat", "Where", "QLinearWhere"):  # a scale or a condition is first
            found = inputs[1]
        else:
            found = inputs[0] if inputs else TensorProto.UNDEFINED
        for name in node.output:
            types.setdefault(name, found)
    return types
