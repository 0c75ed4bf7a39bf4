"""Graphs to ONNX files: the float one as it is, the quantized one with QuantizeLinear and DequantizeLinear.

torch's own exporter writes them. What it leaves to do is here: names that people can find, and no traces of the
machine that it ran on.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qlib.deploy.named import with_named_tensors
from qlib.errors import ExportError
from qlib.files import write_whole
from qlib.graph import Graph
from qlib.graph.ir import source_line
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.lower.qdq import lower_qdq
from qlib.tensor_file import FLUSHED_BELOW

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CODES", "INPUT", "OUTPUT", "export_float", "export_quantized"]

INPUT, OUTPUT = "images", "logits"
"""Names of the model's input and output."""

CODES = "/codes"
"""Ends the name of an integer tensor; before it stands the name of the layer that computes it."""

_EXTERNAL = 1_900_000_000  # bytes; protobuf ends at 2^31


def export_float(graph: Graph, example: Tensor, path: Path, *, opset: int, metadata: Mapping[str, str]) -> None:
    """Writes the float model. The output tensor of each layer, and of each move, has its name.

    Raises ExportError where an operator has no ONNX form, OutputError where the file cannot be written.
    """
    model = _export(with_named_tensors(graph), example, opset)
    _name(model)
    _save(model, path, metadata)


def export_quantized(
    exact: fx.GraphModule, example: Tensor, path: Path, *, opset: int, metadata: Mapping[str, str]
) -> None:
    """Writes the model of `lower_exact` with int8 weights, int32 biases and uint8 activations.

    The integer output of layer NAME is the tensor ``NAME/codes``. From opset 21 on, weights of 4 bits are stored
    as such.

    Raises ExportError where an operator has no ONNX form, OutputError where the file cannot be written.
    """
    if example.device.type != "cpu":
        exact = copy.deepcopy(exact).cpu()
    model = _export(lower_qdq(exact), example.cpu(), opset)
    _name(model)
    _unshare(model)
    if opset >= 21:
        _pack_four_bits(model, {name for name, module in exact.named_modules() if _weight_bits(module) == 4})
    _save(model, path, metadata)


def _weight_bits(module: nn.Module) -> int:
    return module.spec.bits if isinstance(module, (ExactWeighted, FloatWeighted)) else 0


def _translations() -> dict[Any, Callable[..., Any]]:
    """Our operators -> their namesakes."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    ops = torch.ops.qlib

    def constant(value: np.generic) -> Any:
        return op.Constant(value=ir.tensor(value))  # type: ignore[arg-type]

    def quantize(x: Any, scale: float, zero_point: int, bits: int) -> Any:
        code = np.uint8 if bits == 8 else np.uint16
        return op.QuantizeLinear(x, constant(np.float32(scale)), constant(code(zero_point)))

    def dequantize(codes: Any, scale: float, zero_point: int) -> Any:
        code = np.uint8 if codes.dtype == ir.DataType.UINT8 else np.uint16
        return op.DequantizeLinear(codes, constant(np.float32(scale)), constant(code(zero_point)))

    def dequantize_stored(codes: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    def pool(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    return {
        ops.quantize_linear.default: quantize,
        ops.dequantize_linear.default: dequantize,
        ops.dequantize_stored.default: dequantize_stored,
        ops.global_average_pool.default: pool,
    }


def _export(model: fx.GraphModule, example: Tensor, opset: int) -> ir.Model:
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                model.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table=_translations(),
                verbose=False,
                optimize=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_refusal(model, error)) from error
    assert program is not None
    _simplify(program.model)
    return program.model


def _simplify(model: ir.Model) -> None:
    """Folds constants, shapes among them. The exporter's own optimizer also searches for dozens of patterns that are
    not there, in time that grows with the square of the model.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    for node in list(model.graph):
        if node.op_type == "Reshape":
            _fix_shape(model, node)
    fold_constants(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _fix_shape(model: ir.Model, node: ir.Node) -> None:
    """Makes the target of a Reshape constant where only the batch is unknown: -1 stands for it."""
    import onnx_ir as ir

    shape = node.outputs[0].shape
    if shape is None:
        return
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        return
    name = f"{node.outputs[0].name}_shape"
    constant = ir.Tensor(np.array(sizes, dtype=np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=constant.shape, const_value=constant)
    model.graph.register_initializer(value)
    node.replace_input_with(1, value)


def _refusal(model: fx.GraphModule, error: BaseException) -> str:
    """What the exporter could not translate: the operator, the layer, and the line of the model's source."""
    text, layer = str(error), ""
    while error.__cause__ is not None:
        error = error.__cause__
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, fx.Node):
            layer = next((path for path, _ in node.meta.get("nn_module_stack", {}).values() if path), "")
    found = re.search(r"OpOverload\(op='([^']+)'", text)
    called = next((node for node in model.graph.nodes if node.target == layer), None)
    line = source_line(called) if called is not None else ""
    where = f" in layer {layer!r}{f' ({line})' if line else ''}" if layer else ""
    if found is None:
        return f"the model cannot be exported{where}: {' '.join(str(error).split())[:300]}"
    return f"the model cannot be exported: ONNX has no form of {found[1]}{where}; write it with other operators"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter's warnings are for its own developers; what fails is raised."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _layer_of(node: ir.Node) -> str:
    """The layer that a node belongs to; empty for moves between layers."""
    import ast

    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[1]) if len(scopes) > 2 else ""


def _name(model: ir.Model) -> None:
    """Names nodes after layers, and each layer's output after it; drops the exporter's notes."""
    counts: Counter[str] = Counter()
    last: dict[str, ir.Node] = {}
    for node in model.graph:
        layer = _layer_of(node)
        node.metadata_props.clear()
        base = f"{layer}/{node.op_type}" if layer else node.op_type
        counts[base] += 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base] - 1}"
        if layer:
            last[layer] = node
    for layer, node in last.items():
        value = node.outputs[0]
        if value.is_graph_output():
            continue
        value.name = layer + CODES if value.dtype is not None and value.dtype.is_integer() else layer
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _weight_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that dequantize weights and biases."""
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            yield node


def _unshare(model: ir.Model) -> None:
    """Gives each layer a weight of its own, and each weight a zero point of its own.

    The exporter merges equal ones; ONNX Runtime, where it rewrites int8 weights as uint8, cannot rewrite one twice.
    """
    import onnx_ir as ir

    for node in _weight_nodes(model):
        for user, index in list(node.outputs[0].uses())[1:]:
            name = f"{str(user.name).rpartition('/')[0]}/{node.op_type}.{index}"
            output = ir.Value(name=name, type=node.outputs[0].type, shape=node.outputs[0].shape)
            step = ir.Node("", node.op_type, node.inputs, node.attributes.values(), outputs=[output], name=name)
            model.graph.insert_before(user, step)
            user.replace_input_with(index, output)
    for node in _weight_nodes(model):
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None and len(value.uses()) > 1:
                name, const = f"{node.name}.{index}", value.const_value
                own = ir.Value(name=name, type=ir.TensorType(const.dtype), shape=value.shape, const_value=const)
                model.graph.register_initializer(own)
                node.replace_input_with(index, own)


def _pack_four_bits(model: ir.Model, layers: Collection[str]) -> None:
    """Stores the weights of `layers` and their zero points as int4 or uint4, two in a byte."""
    import onnx_ir as ir

    smaller = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}
    for node in _weight_nodes(model):
        if str(node.name).rpartition("/")[0] not in layers:
            continue
        for value in (node.inputs[0], node.inputs[2]):
            if value is not None and value.const_value is not None and value.dtype in smaller:
                kind = smaller[value.dtype]
                packed = ir.Tensor(value.const_value.numpy().astype(kind.numpy()), dtype=kind, name=value.name)
                value.const_value, value.dtype = packed, kind


def _save(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the file, whole or not at all; weights of more than 1.9 GB stand beside it."""
    import onnx_ir as ir

    model.producer_name, model.producer_version = "qlib-compress", metadata.get("version", "")
    model.metadata_props.clear()
    model.metadata_props.update({f"qlib.{key}": value for key, value in metadata.items()})
    _flush(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size > _EXTERNAL else None
    write_whole(path, lambda file: ir.save(model, file, external_data=external), "ONNX model")


def _flush(model: ir.Model) -> None:
    """Weights of almost 0 become 0, as in checkpoints; scales stay: they are divided by."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        scales = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node, _ in value.uses())
        if value.const_value is None or value.dtype != ir.DataType.FLOAT or scales:
            continue
        weights = value.const_value.numpy()
        tiny = (abs(weights) < FLUSHED_BELOW) & (weights != 0)
        if tiny.any():
            value.const_value = ir.Tensor(np.where(tiny, np.float32(0), weights), name=value.name)
