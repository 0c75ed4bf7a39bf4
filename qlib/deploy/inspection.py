"""A look inside the file that ships: the same model, with the codes of every layer among its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qlib.deploy.export import CODES, OUTPUT
from qlib.deploy.kernels import Kernels, exact_layers, kernels_of, open_with_graph
from qlib.deploy.session import run_session
from qlib.files import scratch_folder
from qlib.graph.ir import layer_inputs, source_of
from qlib.lower.base import ActivationGrid
from qlib.lower.exact import activation_grid
from qlib.lower.ops.quantize import Dequantize, Quantize

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["LOGITS", "Inspection", "dequantizes"]

LOGITS = "(logits)"
"""Stands among the names of layers for what leaves the model."""


@dataclass(frozen=True)
class Inspection:
    """The shipped model, and one that gives all codes as well.

    `grids` are the grids of the layers that hold codes, `from_float` those that quantize what a layer computed in float
    (and the logits, where they are float), `seen` those that the file holds, `altered` those whose kernels differ
    between the two models. A layer that is no work (a concatenation of one tensor) has a kernel only where it is seen.
    `merged`: of layers that compute the same of the same, the exporter keeps the first one.
    """

    shipped: ort.InferenceSession
    inspected: ort.InferenceSession
    grids: Mapping[str, ActivationGrid]
    from_float: frozenset[str]
    kernels: Mapping[str, Kernels]
    altered: frozenset[str]
    seen: Sequence[str]
    merged: Mapping[str, str]

    @classmethod
    def open(cls, exact: fx.GraphModule, path: Path) -> Inspection:
        nodes = dict(exact_layers(exact))
        names = [str(node.target) for node in nodes]
        grids = {
            str(node.target): grid
            for node, module in nodes.items()
            if (grid := activation_grid(node)) is not None and not _is_constant(node, module)
        }
        from_float = {
            str(node.target)
            for node, module in nodes.items()
            if isinstance(module, Quantize) and _is_computed(exact, source_of(exact, layer_inputs(node)[0]))
        }
        from_float |= set() if dequantizes(exact) else {LOGITS}
        shipped, graph = open_with_graph(path)
        kernels = kernels_of(graph, names)
        with scratch_folder() as folder:
            exposed = folder / "inspected.onnx"
            seen = _expose(path, exposed, grids)
            inspected, graph = open_with_graph(exposed)
        others = kernels_of(graph, names)
        altered = frozenset(
            name for name, found in kernels.items() if _plain(found) != _plain(others.get(name, Kernels()))
        )
        merged = _merged(exact, seen)
        return cls(shipped, inspected, grids, frozenset(from_float), kernels, altered, seen, merged)

    def run(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and the codes of each layer with the logits among them."""
        logits, *codes = run_session(self.inspected, batch, [OUTPUT, *(name + CODES for name in self.seen)])
        deployed = dict(zip(self.seen, codes, strict=True))
        deployed |= {name: deployed[first] for name, first in self.merged.items()}
        return logits, {**deployed, LOGITS: logits}


def dequantizes(exact: fx.GraphModule) -> bool:
    """Whether the logits of an exact model are dequantized codes."""
    output = next(node for node in exact.graph.nodes if node.op == "output")
    (source,) = layer_inputs(output)
    return source.op == "call_module" and isinstance(exact.get_submodule(str(source.target)), Dequantize)


def _merged(exact: fx.GraphModule, seen: Sequence[str]) -> dict[str, str]:
    """Layers that the file does not hold -> one of the same type on the same inputs, through moves, that it holds."""
    kinds = {node: type(module) for node, module in exact_layers(exact)}
    first: dict[tuple[Any, ...], fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in exact.graph.nodes:
        args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: same.get(source, source))
        kept = first.setdefault((kinds.get(node, node.target), repr(args)), node)
        if kept is not node and str(node.target) not in seen:
            same[node] = kept
    return {str(node.target): str(kept.target) for node, kept in same.items() if str(kept.target) in seen}


def _is_computed(exact: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a float tensor is what a layer computed, and not the input, a constant or dequantized codes."""
    return node.op == "call_module" and not isinstance(exact.get_submodule(str(node.target)), Dequantize)


def _is_constant(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node quantizes an operand that the model holds: the file has its codes only; their user is compared."""
    return isinstance(module, Quantize) and layer_inputs(node)[0].op == "get_attr"


def _plain(kernels: Kernels) -> list[str]:
    """Operators that compute values, whatever the layout of their data."""
    return sorted(each.removeprefix("Nhwc") for each in kernels.operators)


def _expose(path: Path, exposed: Path, grids: Mapping[str, ActivationGrid]) -> list[str]:
    """Writes the model with the codes of the layers `grids` as further outputs; which of them it holds."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(path, load_external_data=False)
    external = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    if external:
        onnx.load_external_data_for_model(model, str(path.parent))
    made = {name for node in model.graph.node for name in node.output}
    seen = [name for name in grids if name + CODES in made]
    for name in seen:
        kind = TensorProto.UINT16 if grids[name].dtype == torch.uint16 else TensorProto.UINT8
        model.graph.output.append(onnx.helper.make_tensor_value_info(name + CODES, kind, None))
    onnx.save(model, exposed, save_as_external_data=external)
    return seen
