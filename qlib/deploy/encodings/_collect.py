"""The grids of a plan by the names of the tensors in the float ONNX file."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from qlib.deploy.encodings._base import Encodings
from qlib.deploy.export import INPUT, OUTPUT
from qlib.deploy.named import is_named
from qlib.graph import Graph, fused_activations
from qlib.graph.ir import is_constant, is_layer, is_move, layer_inputs, name_of
from qlib.graph.kinds import kind_of
from qlib.graph.walk import keeps_grid
from qlib.lower.ops.embedding import ExactEmbedding
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["collect_encodings"]


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
        return module.table_grid.params
    assert isinstance(module, (ExactWeighted, FloatWeighted))
    return module.weight_params
