"""What runs where: the kernel that ONNX Runtime chose for each layer, and why where it computes in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate
from torch import fx, nn

from qlib.deploy.kernels import CLAMPS, MOVES, QDQ_NODES, Kernels, exact_layers, kernels_of, layer_of, open_with_graph
from qlib.files import write_csv
from qlib.graph.ir import layer_inputs
from qlib.graph.kinds import KINDS
from qlib.lower.exact import activation_grid
from qlib.lower.ops.quantize import Dequantize, Quantize
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.lower.saturation import SaturationRate

if TYPE_CHECKING:
    import onnx

__all__ = ["Placed", "int8_share", "placement", "placement_table", "write_placement_csv"]

_HAVE_INTEGER_KERNELS = frozenset(name for kind in KINDS.values() for name in kind.onnx)
"""Float operators that ONNX Runtime replaces by integer kernels where their pattern is right."""


NEVER = SaturationRate(pairs=0, saturated=0, outputs=0)


@dataclass(frozen=True)
class Placed:
    """Where one layer runs: `kernels` is empty where `why` says which layer's kernel computes it as well.

    `saturation` tells how its sums would saturate on x86 without VNNI. Law: `why` gives the reason exactly where
    `integer` is false, or that other layer.
    """

    layer: str
    kernels: str
    integer: bool
    why: str
    macs: int
    saturation: SaturationRate = NEVER


def placement(
    path: Path, exact: fx.GraphModule, macs: Mapping[str, int | None], rates: Mapping[str, SaturationRate] | None = None
) -> list[Placed]:
    """Where each layer of the exported model runs, in execution order.

    `macs` are multiply-accumulates and `rates` saturation, by layer; layers that are not in them have none.
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
        if found is None or set(found.operators) == {"DequantizeLinear"}:  # a float kernel has taken it in
            found = None
            integer, why = _absorbed(node, kernels)
        else:
            integer, why = found.integer, "" if found.integer else _why(node, module, found, shipped)
        rate = (rates or {}).get(name, NEVER)
        placed.append(Placed(name, str(found or ""), integer, why, macs.get(name) or 0, rate))
    return placed


@dataclass(frozen=True)
class _Shipped:
    """What the file says about layers: the operators that compute each, and what keeps some from being fused.

    `nibbles`: the weight is stored in 4 bits; `constant`: one operand is a float constant; `shared`: the float result
    is used by others than one quantize step.
    """

    operators: Mapping[str, tuple[str, ...]]
    nibbles: frozenset[str]
    constant: frozenset[str]
    shared: frozenset[str]

    @classmethod
    def of(cls, graph: onnx.GraphProto, layers: frozenset[str]) -> _Shipped:
        uses: dict[str, int] = {}
        for name in (*(name for node in graph.node for name in node.input), *(each.name for each in graph.output)):
            uses[name] = uses.get(name, 0) + 1
        from onnx import TensorProto

        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        operators: dict[str, list[str]] = {}
        nibbles, constant, shared = set(), set(), set()
        for node in graph.node:
            layer = layer_of(node.name, layers)
            kinds = {types.get(name) for name in node.input}
            if layer is not None and not kinds.isdisjoint((TensorProto.INT4, TensorProto.UINT4)):
                nibbles.add(layer)
            if layer is None or node.op_type in (*MOVES, *QDQ_NODES, *CLAMPS):
                continue
            operators.setdefault(layer, []).append(node.op_type)
            if TensorProto.FLOAT in kinds:
                constant.add(layer)
            if uses.get(node.output[0], 0) > 1:
                shared.add(layer)
        found = {layer: tuple(dict.fromkeys(names)) for layer, names in operators.items()}
        return cls(found, frozenset(nibbles), frozenset(constant), frozenset(shared))


def _absorbed(node: fx.Node, kernels: Mapping[str, Kernels]) -> tuple[bool, str]:
    """Whether integers, and the sentence, for a layer without a node of its own: its producer's kernel computes it.

    Of several producers it is the one in float: a float convolution adds what else arrives.
    """
    producers = [name for source in layer_inputs(node) if (name := _producer(source, kernels))]
    if not producers:
        return activation_grid(node) is not None, "nothing is left to compute"
    producer = min(producers, key=lambda name: kernels[name].integer)
    return kernels[producer].integer, f"computed by {producer}"


def _producer(node: fx.Node, kernels: Mapping[str, Kernels]) -> str:
    """The layer, this one or one before it along the first inputs, that has a kernel; empty where none has."""
    while str(node.target) not in kernels:
        sources = layer_inputs(node)
        if not sources:
            return ""
        node = sources[0]
    return str(node.target)


def _why(node: fx.Node, module: nn.Module, kernels: Kernels, shipped: _Shipped) -> str:
    """Why a layer runs in float."""
    name, output = str(node.target), activation_grid(node)
    arriving = [activation_grid(source) for source in layer_inputs(node)]
    grids = [grid for grid in (*arriving, output) if grid is not None]
    if not grids:
        return "its inputs and its output are float"
    wide = max(grid.params.spec.bits for grid in grids)
    if wide > 8:
        return f"{wide}-bit activations: ONNX Runtime has integer kernels for at most 8"
    if bits := 4 if name in shipped.nibbles else _wide_weight(module):
        return f"weights stored in {bits} bits: ONNX Runtime has integer kernels for 8 only"
    operators = [each for each in dict.fromkeys(kernels.operators) if each not in CLAMPS]
    if not _HAVE_INTEGER_KERNELS.issuperset(operators):  # the file knows them by better names
        operators = list(shipped.operators.get(name, operators))
    unknown = ", ".join(each for each in operators if each not in _HAVE_INTEGER_KERNELS)
    reasons = {
        f"ONNX Runtime has no integer kernel for {unknown}": bool(unknown),
        "an input is float": None in arriving,
        "its output is float": output is None,
        f"{', '.join(operators)} without quantize steps between them": len(operators) > 1,
        "an operand is a float constant": name in shipped.constant,
        "its float result has several consumers": name in shipped.shared,
    }
    otherwise = f"ONNX Runtime does not fuse this {', '.join(operators)} with its quantize steps"
    return next((reason for reason, holds in reasons.items() if holds), otherwise)


def _wide_weight(module: nn.Module) -> int:
    """The bits that a weight is stored in where its codes need more than 8; 0 for others."""
    wide = isinstance(module, (ExactWeighted, FloatWeighted)) and module.weight_codes.element_size() > 1
    return 32 if wide else 0


def int8_share(placed: Sequence[Placed]) -> float:
    """The share of multiply-accumulates that integer kernels compute, 0 to 1; 1 where there are none.

    >>> int8_share([Placed("a", "QGemm", True, "", 30), Placed("b", "Gemm", False, "its output is float", 10)])
    0.75
    """
    total = sum(each.macs for each in placed)
    return sum(each.macs for each in placed if each.integer) / total if total else 1.0


def placement_table(placed: Sequence[Placed]) -> str:
    """One line a layer, and the share of multiply-accumulates in integers."""
    rows = [
        [each.layer, each.kernels, _type(each), each.why, f"{each.macs:,}", _saturates(each.saturation)]
        for each in placed
    ]
    headers = ["Layer", "Kernel", "Type", "Why", "MACs", "Saturates without VNNI"]
    table = tabulate(rows, headers, tablefmt="psql", disable_numparse=True, colalign=_ALIGN)
    return f"{table}\n{100 * int8_share(placed):.2f}% of multiply-accumulates in integers"


_ALIGN = ("left", "left", "left", "left", "right", "left")


def _saturates(rate: SaturationRate) -> str:
    if not rate.possible:
        return "never"
    return f"{100 * rate.share:.2g} % of sums" if rate.outputs else f"can ({rate.pairs} pairs)"


def _type(placed: Placed) -> str:
    return "integer" if placed.integer else "float"


def write_placement_csv(path: Path, placed: Sequence[Placed]) -> None:
    """Writes the table, with the pairs of weights that can saturate and the share of sums that did, if measured.

    Raises OutputError where that is impossible.
    """
    write_csv(path, ("layer", "kernel", "type", "why", "macs", "pairs_at_risk", "saturated"), map(_row, placed))


def _row(placed: Placed) -> Sequence[object]:
    rate = placed.saturation
    saturated = rate.share if rate.outputs or not rate.possible else ""
    return placed.layer, placed.kernels, _type(placed), placed.why, placed.macs, rate.pairs, saturated
