"""What runs where: the kernel that ONNX Runtime chose for each layer, and why where it computes in float."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate
from torch import fx, nn

from qlib.deploy.export_onnx import CODES
from qlib.deploy.session import open_session
from qlib.errors import OutputError
from qlib.graph.ir import kind_of, layer_inputs
from qlib.lower.exact import EDGE
from qlib.lower.ops.base import Edge
from qlib.lower.ops.quantize import Dequantize, Quantize
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

__all__ = [
    "Kernels",
    "Placed",
    "exact_layers",
    "int8_share",
    "kernels_of",
    "open_with_graph",
    "placement",
    "placement_table",
    "write_placement_csv",
]

_MOVE_NAMES = (
    "Transpose Reshape Identity Squeeze Unsqueeze Flatten Slice Split Gather Expand Tile Shape Size Cast Pad"
    " DepthToSpace SpaceToDepth"
)
_MOVES = frozenset(_MOVE_NAMES.split())
"""Operators that compute no values."""

_STEPS = ("QuantizeLinear", "DequantizeLinear")
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")
"""How the names of operators begin that compute in integers whatever type leaves them."""

_FUSED_NAMES = (
    "Conv Gemm MatMul Add Mul Concat AveragePool GlobalAveragePool Softmax Sigmoid LeakyRelu Relu Clip MaxPool"
)
_HAVE_INTEGER_KERNELS = frozenset(_FUSED_NAMES.split())
"""Float operators that ONNX Runtime replaces by integer kernels where their pattern is right."""


@dataclass(frozen=True)
class Kernels:
    """The operators that compute one layer, in execution order; `integer` where none of them computes in float.

    Moves of data are left out. A layer of which nothing else remains has the quantize and dequantize steps, if any.
    """

    operators: tuple[str, ...] = ()
    integer: bool = True

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(self.operators))


@dataclass(frozen=True)
class Placed:
    """Where one layer runs: `kernels` is empty where `why` says which layer's kernel computes it as well.

    Law: `why` gives the reason exactly where `integer` is false, or that other layer.
    """

    layer: str
    kernels: str
    integer: bool
    why: str
    macs: int


def exact_layers(exact: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """The nodes of an exact model that compute values, and their modules, in execution order."""
    for node in exact.graph.nodes:
        if node.op == "call_module":
            module = exact.get_submodule(str(node.target))
            if kind_of(module) != "move":
                yield node, module


def open_with_graph(model: Path) -> tuple[ort.InferenceSession, onnx.GraphProto]:
    """A session on a file, and the optimized graph that it runs (without the values of large tensors)."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = open_session(model, optimized=optimized)
        return session, onnx.load(optimized, load_external_data=False).graph


def kernels_of(graph: onnx.GraphProto, layers: Collection[str]) -> dict[str, Kernels]:
    """The kernels of each layer that has nodes of its own in an optimized graph."""
    from onnx import TensorProto

    types = _element_types(graph)
    computing: dict[str, list[str]] = {}
    steps: dict[str, list[str]] = {}
    in_float: set[str] = set()
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    for node, layer in zip(graph.node, _owners(graph, frozenset(layers)), strict=True):
        kinds = {types.get(name, TensorProto.UNDEFINED) for name in node.output if name}
        if layer is None or kinds <= {TensorProto.INT64, TensorProto.BOOL}:
            continue
        if node.op_type in _STEPS:
            steps.setdefault(layer, []).append(node.op_type)
        elif node.op_type not in _MOVES:
            computing.setdefault(layer, []).append(node.op_type)
            if not node.op_type.startswith(_INTEGER) and not kinds.isdisjoint(floats):
                in_float.add(layer)
        else:
            steps.setdefault(layer, [])
    return {
        layer: Kernels(tuple(computing.get(layer) or steps[layer]), layer not in in_float)
        for layer in dict.fromkeys([*computing, *steps])
    }


def _owners(graph: onnx.GraphProto, layers: frozenset[str]) -> list[str | None]:
    """The layer of each node: from its name, from the name of what it computes, or that of the node that uses it.

    Nodes keep the exporter's names through fusions, with something appended; those that ONNX Runtime makes from the
    body of a function (hard-swish, ...) have none.
    """
    users: dict[str, int] = {}
    for index in reversed(range(len(graph.node))):
        for name in graph.node[index].input:
            users[name] = index  # the first one in the end
    owners: list[str | None] = [None] * len(graph.node)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        named = (node.name, *node.output, *(name + "/" for name in node.output))
        owners[index] = next((layer for layer in (_prefix(name, layers) for name in named) if layer), None)
        if owners[index] is None and not node.name and node.output[0] in users:
            owners[index] = owners[users[node.output[0]]]
    return owners


def _prefix(name: str, layers: frozenset[str]) -> str | None:
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


def placement(path: Path, exact: fx.GraphModule, macs: Mapping[str, int]) -> list[Placed]:
    """Where each layer of the exported model runs, in execution order.

    `macs` are multiply-accumulates by layer; layers that are not in it have none.
    """
    import onnx

    names = [str(node.target) for node, _ in exact_layers(exact)]
    kernels = kernels_of(open_with_graph(path)[1], names)
    shipped = _Shipped.of(onnx.load(path, load_external_data=False).graph, frozenset(names))
    placed = []
    for node, module in exact_layers(exact):
        name = str(node.target)
        if isinstance(module, (Quantize, Dequantize)):
            continue
        found = kernels.get(name)
        if found is None:
            integer, why = _absorbed(node, kernels)
        else:
            integer, why = found.integer, "" if found.integer else _why(node, module, found, shipped)
        placed.append(Placed(name, str(found or ""), integer, why, macs.get(name, 0)))
    return placed


@dataclass(frozen=True)
class _Shipped:
    """What the file says about layers: operators of their nodes, and those whose float result has several uses."""

    operators: Mapping[str, tuple[str, ...]]
    shared: frozenset[str]

    @classmethod
    def of(cls, graph: onnx.GraphProto, layers: frozenset[str]) -> _Shipped:
        uses: dict[str, int] = {}
        for name in (*(name for node in graph.node for name in node.input), *(each.name for each in graph.output)):
            uses[name] = uses.get(name, 0) + 1
        operators: dict[str, list[str]] = {}
        shared = set()
        for node in graph.node:
            layer = _prefix(node.name, layers)
            if layer is None or node.op_type in _MOVES or node.op_type in _STEPS:
                continue
            operators.setdefault(layer, []).append(node.op_type)
            if uses.get(node.output[0], 0) > 1 and not node.output[0].endswith(CODES):
                shared.add(layer)
        return cls({layer: tuple(found) for layer, found in operators.items()}, frozenset(shared))


def _absorbed(node: fx.Node, kernels: Mapping[str, Kernels]) -> tuple[bool, str]:
    """Whether integers, and the sentence, for a layer without a node of its own: its producer's kernel computes it."""
    sources = layer_inputs(node)
    while sources and str(sources[0].target) not in kernels:
        sources = layer_inputs(sources[0])
    if not sources:
        return node.meta.get(EDGE) is not None, "nothing is left to compute"
    producer = str(sources[0].target)
    return kernels[producer].integer, f"computed by {producer}"


def _why(node: fx.Node, module: nn.Module, kernels: Kernels, shipped: _Shipped) -> str:
    """Why a layer runs in float."""
    name, edges = str(node.target), [source.meta.get(EDGE) for source in layer_inputs(node)]
    output = node.meta.get(EDGE)
    if not any(isinstance(edge, Edge) for edge in (*edges, output)):
        return "its inputs and its output are float"
    wide = max(edge.params.spec.bits for edge in (*edges, output) if isinstance(edge, Edge))
    if wide > 8:
        return f"{wide}-bit activations: ONNX Runtime has integer kernels for at most 8"
    if bits := _odd_weight(module):
        return f"{bits}-bit weights: ONNX Runtime has integer kernels for 8 only"
    operators = shipped.operators.get(name, kernels.operators)
    unknown = [each for each in dict.fromkeys(operators) if each not in _HAVE_INTEGER_KERNELS]
    if unknown:
        return f"ONNX Runtime has no integer kernel for {', '.join(unknown)}"
    if None in edges:
        return "an input is float"
    if output is None:
        return "its output is float"
    if name in shipped.shared:
        return "its float result has several consumers"
    return f"ONNX Runtime does not fuse this {', '.join(dict.fromkeys(operators))} with its quantize steps"


def _odd_weight(module: nn.Module) -> int:
    """The bits of a weight that is stored in another type than one of 8 bits; 0 for others."""
    if not isinstance(module, (ExactWeighted, FloatWeighted)) or module.weight_codes.dtype in (torch.int8, torch.uint8):
        return 0
    return module.spec.bits


def int8_share(placed: Sequence[Placed]) -> float:
    """The share of multiply-accumulates that integer kernels compute, 0 to 1; 1 where there are none.

    >>> int8_share([Placed("a", "QGemm", True, "", 30), Placed("b", "Gemm", False, "its output is float", 10)])
    0.75
    """
    total = sum(each.macs for each in placed)
    return sum(each.macs for each in placed if each.integer) / total if total else 1.0


def placement_table(placed: Sequence[Placed]) -> str:
    """One line a layer, and the share of multiply-accumulates in integers."""
    rows = [[each.layer, each.kernels, _type(each), each.why, f"{each.macs:,}"] for each in placed]
    table = tabulate(
        rows, ["Layer", "Kernel", "Type", "Why", "MACs"], tablefmt="psql", disable_numparse=True, colalign=_ALIGN
    )
    return f"{table}\n{100 * int8_share(placed):.2f}% of multiply-accumulates in integers"


_ALIGN = ("left", "left", "left", "left", "right")


def _type(placed: Placed) -> str:
    return "integer" if placed.integer else "float"


def write_placement_csv(path: Path, placed: Sequence[Placed]) -> None:
    """Writes ``layer,kernel,type,why,macs``; raises OutputError where that is impossible."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("layer", "kernel", "type", "why", "macs"))
            writer.writerows((each.layer, each.kernels, _type(each), each.why, each.macs) for each in placed)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
