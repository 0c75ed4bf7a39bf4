"""The exact lowering: what `--quantize-eval` runs computes the integers that are deployed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from qlib.errors import StatsError
from qlib.graph import Graph, activation_bounds, fused_activations, kind_of
from qlib.graph.ir import attribute, is_layer, is_move, layer_inputs, name_of
from qlib.lower.base import LOWERINGS, ActivationGrid, LayerContext
from qlib.lower.ops.quantize import Dequantize, Quantize
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["activation_grid", "lower_exact"]

_GRID = "grid"


def activation_grid(node: fx.Node) -> ActivationGrid | None:
    """The grid of the codes that a node of an exact model holds; None where it holds floats."""
    grid = node.meta.get(_GRID)
    assert grid is None or isinstance(grid, ActivationGrid)
    return grid


def lower_exact(graph: Graph, plan: Plan) -> fx.GraphModule:
    """A module that computes `plan` on `graph` in integer arithmetic; takes and returns float tensors.

    Its layers keep their names; its state holds integer weights. Activations between layers are centered codes in
    float32 (see `lower.base`), so that it runs at about the speed of the float model on any device.
    """
    assert not plan.dynamic
    builder = _Builder(graph, plan)
    for node in graph.graph.nodes:
        builder.add(node)
    return builder.finish()


@dataclass
class _Builder:
    """Walks the float graph and writes the integer one; `grids` holds the grid of each node's output."""

    graph: Graph
    plan: Plan
    new: fx.Graph = field(default_factory=fx.Graph)
    root: dict[str, object] = field(default_factory=dict)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    grids: dict[fx.Node, ActivationGrid | None] = field(default_factory=dict)
    quantized: dict[tuple[fx.Node, TensorPlan], tuple[fx.Node, ActivationGrid]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fused = fused_activations(self.graph)
        self.skipped: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Writes one node."""
        if node in self.skipped:  # an activation that its producer's clamp already computes
            producer = self.skipped[node]
            self.values[node], self.grids[node] = self.values[producer], self.grids[producer]
        elif node.op == "output":
            self.new.output(self._as_float(layer_inputs(node)[0]))
        elif is_layer(self.graph, node):
            self._add_layer(node)
        else:
            self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.root[str(node.target)] = attribute(self.graph, node)
        elif node.op == "call_module":
            self.root[str(node.target)] = self.graph.get_submodule(str(node.target))
        self.values[node] = self.new.node_copy(node, lambda old: self.values[old])
        self.grids[node] = self.grids[layer_inputs(node)[0]] if is_move(self.graph, node) else None
        self.values[node].meta[_GRID] = self.grids[node]

    def _add_layer(self, node: fx.Node) -> None:
        module, name = self.graph.get_submodule(str(node.target)), name_of(node)
        plan = self.plan.layers.get(name, LayerPlan(kind_of(module)))
        planned = (*plan.inputs, *[None] * len(layer_inputs(node)))
        arrivals = [self._arrive(source, grid) for source, grid in zip(layer_inputs(node), planned, strict=False)]
        activation = self.fused.get(node) if plan.output is not None else None
        bounds = None if activation is None else activation_bounds(self.graph, activation)
        output = ActivationGrid.of(_params(name, plan.output), bounds) if plan.output is not None else None
        context = LayerContext(module, plan, tuple(grid for _, grid in arrivals), output)
        lowered, grid = LOWERINGS[kind_of(module)](context)
        self.root[name] = lowered
        tensors = iter(arrivals)  # in the order of layer_inputs: one input may be used twice, on two grids
        args = fx.node.map_arg(node.args, lambda old: next(tensors)[0] if old.meta["tensor"] else self.values[old])
        self.values[node] = self.new.create_node("call_module", name, args, name=node.name)
        self.values[node].meta = {**node.meta, _GRID: grid}
        self.grids[node] = grid
        if activation is not None and grid is not None:
            self.skipped[activation] = node

    def _arrive(self, source: fx.Node, planned: TensorPlan | None) -> tuple[fx.Node, ActivationGrid | None]:
        """The value of an input and its grid, put on the planned one first, from float or from its producer's."""
        value, arriving = self.values[source], self.grids[source]
        if planned is None:
            return value, arriving
        if (source, planned) not in self.quantized:
            grid = ActivationGrid.of(_params(name_of(source), planned))
            if arriving is not None and arriving.params == grid.params:
                return value, arriving
            codes = self._call("quantize", source, Quantize(grid), self._as_float(source), grid)
            self.quantized[source, planned] = codes, grid
        return self.quantized[source, planned]

    def _as_float(self, source: fx.Node) -> fx.Node:
        grid = self.grids[source]
        value = self.values[source]
        return value if grid is None else self._call("dequantize", source, Dequantize(grid), value, None)

    def _call(
        self, what: str, source: fx.Node, module: nn.Module, value: fx.Node, grid: ActivationGrid | None
    ) -> fx.Node:
        target, count = f"{what}_{source.name}", 0
        while target in self.root:
            count += 1
            target = f"{what}_{source.name}_{count}"
        self.root[target] = module
        called = self.new.call_module(target, (value,))
        called.meta = {**source.meta, _GRID: grid}
        return called

    def finish(self) -> fx.GraphModule:
        """The integer model."""
        lowered = fx.GraphModule(self.root, self.new)
        lowered.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        lowered.delete_all_unused_submodules()
        lowered.recompile()
        return lowered.eval()


def _params(name: str, plan: TensorPlan) -> QParams:
    try:
        return plan.qparams()
    except ValueError as error:
        raise StatsError(f"the range {plan.min} .. {plan.max} of {name!r} cannot be quantized: {error}") from error
