"""The ranges alone, for tools that quantize the float ONNX file by themselves; keyed by the names of its tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from qlib.deploy.export import INPUT, OUTPUT
from qlib.deploy.named import is_named
from qlib.errors import ExportError, StatsError
from qlib.files import write_text
from qlib.graph import Graph, fused_activations
from qlib.graph.ir import is_constant, is_layer, is_move, layer_inputs, name_of
from qlib.graph.kinds import kind_of
from qlib.graph.walk import keeps_grid
from qlib.lower.ops.embedding import ExactEmbedding
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.quant.affine import QParams, qparams_from_range
from qlib.quant.plan import LayerPlan, Plan, TensorPlan
from qlib.quant.spec import QuantSpec
from qlib.registry import Registry

__all__ = ["ENCODINGS", "Encodings", "Format", "collect_encodings", "encodings_file", "write_encodings"]

_AIMET_BITS = 4
"""The fewest bits of an AIMET encoding."""


@dataclass(frozen=True)
class Encodings:
    """Tensor name -> grid, in execution order: of activations, and of weights and other constants.

    `implied` names the activations that only repeat the grid of another: a tensor before a fused ReLU that of the
    ReLU's, a moved one that of its source. Some readers ask for them, others work it out.

    Laws: what stays in float is absent; a tensor that two layers put on different grids has the one with more bits,
    then the one with the wider range.
    """

    activations: Mapping[str, TensorPlan]
    parameters: Mapping[str, QParams] = field(default_factory=dict)
    implied: frozenset[str] = frozenset()

    @property
    def own(self) -> dict[str, TensorPlan]:
        """The activations without the implied ones."""
        return {name: grid for name, grid in self.activations.items() if name not in self.implied}


@dataclass(frozen=True)
class Format:
    """A file format: what it says of `Encodings`, of which of their tensors, and how its file's name ends."""

    text: Callable[[Encodings], str]
    tensors: Callable[[Encodings], Mapping[str, Any]]
    ending: str


ENCODINGS: Registry[Format] = Registry("format of encodings")
"""Name on the command line -> file format."""


def encodings_file(kind: str, arch: str) -> str:
    """The name of the file where none is given. Raises QlibError for an unknown format.

    >>> [encodings_file(kind, "resnet18") for kind in ENCODINGS]
    ['resnet18_calibration_ort.json', 'resnet18_calibration.cache', 'resnet18_encodings.json']
    """
    return f"{arch}_{ENCODINGS[kind].ending}"


def write_encodings(kind: str, path: Path, graph: Graph, plan: Plan, lowered: nn.Module) -> int:
    """Writes the ranges of `plan` in the format `kind`; returns of how many tensors.

    `graph` is the folded float graph and `lowered` its exact form, from which the scales of the weights are taken: it
    may have been restored from a checkpoint, the weights of `graph` do not matter. The file is whole or absent.

    Raises QlibError for an unknown format, StatsError for a plan without ranges, ExportError where the format cannot
    express one, OutputError where the file cannot be written.
    """
    chosen = ENCODINGS[kind]
    if plan.dynamic:
        raise StatsError(
            f"a dynamic plan has no ranges to export for {kind}: each image has its own; drop --qe-dynamic"
            " and give statistics with --qe-stats-file or --qe-calibration"
        )
    encodings = collect_encodings(graph, plan, lowered)
    count = len(chosen.tensors(encodings))
    if not count:
        raise StatsError(f"no range to export for {kind}: the plan leaves everything in float; give --qe-bits-acts")
    write_text(path, chosen.text(encodings), "encodings")
    return count


def collect_encodings(graph: Graph, plan: Plan, lowered: nn.Module) -> Encodings:
    """The grids of `plan`, which is not dynamic, by the names of the float ONNX file of `graph`.

    Layer NAME computes the tensor NAME, and its weight is NAME.weight; the model's input and output have names of
    their own. The grid of a layer whose ReLU is fused belongs to the ReLU's tensor.
    """
    collector = _Collector(graph, plan, lowered)
    for node in graph.graph.nodes:
        collector.add(node)
    return Encodings(collector.activations, collector.parameters, frozenset(collector.implied))


@dataclass
class _Collector:
    """Walks the graph; `grids` holds the grid of each node that arrives quantized at its users."""

    graph: Graph
    plan: Plan
    lowered: nn.Module
    activations: dict[str, TensorPlan] = field(default_factory=dict)
    parameters: dict[str, QParams] = field(default_factory=dict)
    implied: set[str] = field(default_factory=set)
    grids: dict[fx.Node, TensorPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fused = fused_activations(self.graph)

    def add(self, node: fx.Node) -> None:
        """Notes the grids of a node, and of its inputs where it quantizes them."""
        if node.op == "output" or not node.meta["tensor"]:
            return
        if is_layer(self.graph, node):
            self._add_layer(node)
        elif is_move(self.graph, node):
            self._pass_on(node)
        if node in self.grids:
            self._keep(node, self.grids[node])

    def _add_layer(self, node: fx.Node) -> None:
        kind = kind_of(self.graph.get_submodule(str(node.target)))
        plan = self.plan.layers.get(name_of(node), LayerPlan(kind))
        for source, grid in zip(layer_inputs(node), plan.inputs, strict=False):
            if grid is not None and source not in self.grids:
                self._keep_chain(source, grid)
        if plan.weight is not None:
            self._keep_parameter(f"{node.target}.weight", _weight_params(self.lowered.get_submodule(name_of(node))))
        if keeps_grid(self.graph, node):
            self._pass_on(node)
        elif plan.output is not None:
            self.grids[node] = plan.output

    def _pass_on(self, node: fx.Node) -> None:
        source = layer_inputs(node)[0]
        if source in self.grids:
            self.grids[node] = self.grids[source]

    def _keep_chain(self, node: fx.Node, grid: TensorPlan) -> None:
        """Notes a grid of float values: of `node`, and back through moves to where they come from."""
        self._keep(node, grid)
        if is_move(self.graph, node):
            self._keep_chain(layer_inputs(node)[0], grid)

    def _keep(self, node: fx.Node, grid: TensorPlan) -> None:
        if is_constant(node):
            self._keep_parameter(name_of(node), grid.qparams())
            return
        name = _tensor_name(node)
        if name is None:
            return
        if name not in self.activations or _rank(grid) > _rank(self.activations[name]):
            self.activations[name] = grid
        if node in self.fused or (node.op in ("call_function", "call_method") and name != OUTPUT):
            self.implied.add(name)

    def _keep_parameter(self, name: str, params: QParams) -> None:
        known = self.parameters.get(name)
        if known is None or params.spec.bits > known.spec.bits:
            self.parameters[name] = params


def _rank(grid: TensorPlan) -> tuple[int, float]:
    assert grid.min is not None
    assert grid.max is not None
    return grid.spec.bits, grid.max - grid.min


def _tensor_name(node: fx.Node) -> str | None:
    """What the float ONNX file calls the tensor of a node; None where the exporter chooses the name."""
    if any(user.op == "output" for user in node.users):
        return OUTPUT
    if node.op == "placeholder":
        return INPUT
    return name_of(node) if is_named(node) else None


def _weight_params(module: nn.Module) -> QParams:
    if isinstance(module, ExactEmbedding):
        return module.edge.params
    assert isinstance(module, (ExactWeighted, FloatWeighted))
    return module.weight_params


def ort_text(encodings: Encodings) -> str:
    """JSON of ONNX Runtime's `TensorsData`: tensor -> lowest and highest value; no parameters.

    For ``onnxruntime.quantization.quantize_static(..., calibration_cache_path=...)`` with its default MinMax method.
    Bits and mode are not in the file; those are arguments of `quantize_static`. It asks for the tensor before a ReLU
    too, and gives it the ReLU's range, as is done here.

    Source: onnxruntime 1.31, ``quantization/calibrate.py``, `load_tensors_data`.
    """

    def number(value: float | None) -> dict[str, Any]:
        return {"data": value, "dtype": "float32", "CLS": "numpy.array"}

    data = {
        name: {"lowest": number(grid.min), "highest": number(grid.max), "CLS": "TensorData"}
        for name, grid in encodings.activations.items()
    }
    method = {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"}
    return _json({"CLS": "TensorsData", "data": data, "calibration_method": method, "smooth_quant": False})


def tensorrt_text(encodings: Encodings) -> str:
    """A calibration cache of TensorRT: a line for each tensor, its scale as the hexadecimal digits of a float32.

    TensorRT's implicit quantization is 8-bit and symmetric by nature, so other bits and modes of the plan are not
    expressed: ``scale = max(|min|, |max|) / 127``, 1 for an all-zero range; no parameters. The first line names a
    version of TensorRT; put yours there if it refuses the file.

    Source: NVIDIA's description of the calibration file in its sampleINT8.

    >>> grid = TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-127.0, max=12.7)
    >>> print(tensorrt_text(Encodings({"conv1": grid})), end="")
    TRT-8601-EntropyCalibration2
    conv1: 3f800000
    """
    lines = ["TRT-8601-EntropyCalibration2"]
    spec = QuantSpec.of_mode("sym_restr", 8)
    for name, grid in encodings.activations.items():
        assert grid.min is not None
        assert grid.max is not None
        scale = float(qparams_from_range(grid.min, grid.max, spec).scale)
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    return "\n".join(lines) + "\n"


def aimet_text(encodings: Encodings) -> str:
    """JSON of AIMET's encodings, version 0.6.1: tensor -> a list with one encoding, or one for each output channel.

    AIMET counts codes from 0, whatever the sign: ``x ~= (code + offset) * scale``. So `offset` is the negative of the
    zero point of the unsigned codes: ``-z`` of an unsigned grid, ``-(z + 2^(bits-1))`` of a signed one.
    `min` and `max` are the real values of the grid's smallest and largest code.

    Raises ExportError for fewer than 4 bits, which the format does not have.

    Source: AIMET's "Encoding Format Specification"; aimet-onnx 2.42, ``_encoding.py``.
    """
    activations = {name: grid.qparams() for name, grid in encodings.own.items()}
    return _json(
        {
            "version": "0.6.1",
            "activation_encodings": {name: _aimet(name, params) for name, params in activations.items()},
            "param_encodings": {name: _aimet(name, params) for name, params in encodings.parameters.items()},
        }
    )


def _aimet(name: str, params: QParams) -> list[dict[str, Any]]:
    spec = params.spec
    if spec.bits < _AIMET_BITS:
        raise ExportError(
            f"AIMET encodings have 4 bits or more, but {name!r} has {spec.bits}; give its layer 4, or leave it in float"
        )

    def values(tensor: Tensor) -> list[float]:
        flat: list[float] = tensor.double().reshape(-1).tolist()
        return flat

    scale = params.scale.double()
    columns = (values(scale), values(scale * params.low), values(scale * params.high), values(params.zero_point))
    return [
        {
            "bitwidth": spec.bits,
            "dtype": "int",
            "is_symmetric": str(spec.symmetric),
            "max": high,
            "min": low,
            "offset": -(int(zero_point) + spec.unsigned_shift),
            "scale": step,
        }
        for step, low, high, zero_point in zip(*columns, strict=True)
    ]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


ENCODINGS.add("ort", Format(ort_text, lambda all: all.activations, "calibration_ort.json"))
ENCODINGS.add("tensorrt", Format(tensorrt_text, lambda all: all.activations, "calibration.cache"))
ENCODINGS.add("aimet", Format(aimet_text, lambda all: {**all.own, **all.parameters}, "encodings.json"))
