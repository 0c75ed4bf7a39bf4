"""Partial forward passes: a search repeats only what comes after the layer that it changed.

A folded graph becomes a list of steps: computing a node, rounding an input of a layer, rounding its output. The state
before a step holds just the values that are still needed (a tensor or two in most networks), and `run` goes from the
state before one step to that before another. Values on a grid are held as real values; up to float32 rounding they
are those of the exact lowering.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from qlib.graph import Graph, fused_activations
from qlib.graph.ir import attribute, is_layer, layer_inputs, layers, name_of
from qlib.graph.weights import swap_channels
from qlib.lower.base import ActivationGrid
from qlib.quant.affine import dequantize, quantize
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan

__all__ = [
    "FLOAT",
    "OUTPUT",
    "WEIGHT",
    "QuantState",
    "Replay",
    "Slot",
    "State",
    "grid_of",
    "rounded",
    "rounded_weight",
    "slots",
]

OUTPUT = -1
"""The slot of a layer's output; those of its inputs count from 0."""

WEIGHT = -2
"""The slot of a layer's weight."""

Slot: TypeAlias = tuple[str, int]
"""The position of a quantizer: layer name, and input number, `OUTPUT` or `WEIGHT`."""

_Key: TypeAlias = "fx.Node | tuple[fx.Node, int]"
State: TypeAlias = dict[_Key, Any]
"""The values that the steps to come need."""


def rounded(x: Tensor, grid: ActivationGrid) -> Tensor:
    """``clamp(round(x / s), low, high) * s``, on a copy.

    >>> from qlib.quant.affine import qparams_from_range
    >>> from qlib.quant.spec import QuantSpec
    >>> grid = ActivationGrid.of(qparams_from_range(-1.875, 1.875, QuantSpec.of_mode("sym", 4)))
    >>> rounded(torch.tensor([0.26, 9.0]), grid)
    tensor([0.2500, 1.7500])
    """
    scale = grid.scale.to(x.device)  # dividing by a CPU scalar multiplies by its reciprocal on CUDA
    return torch.div(x, scale).round_().clamp_(grid.low, grid.high).mul_(scale)


def rounded_weight(module: nn.Module, plan: WeightPlan) -> Tensor:
    """The weight of a layer on the grid of its plan, laid out as it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    swapped = swap_channels(module, weight.detach())
    params = plan.qparams(swapped)
    return swap_channels(module, dequantize(quantize(swapped, params), params)).contiguous(
        memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    )


@dataclass(frozen=True)
class QuantState:
    """The state of quantization: which weights and activations are rounded, and to which grid; all else is float."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    grids: Mapping[Slot, ActivationGrid] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> QuantState:
        """The state under a whole plan, whose ranges are fixed."""
        point = cls()
        for node, module in layers(graph):
            layer = plan.layers[name_of(node)]
            for slot in slots(name_of(node), layer):
                point = point.with_slot(slot, grid_of(layer, slot), module)
        return point

    def with_slot(self, slot: Slot, grid: TensorPlan | WeightPlan, module: nn.Module) -> QuantState:
        """With one grid set or replaced; `module` is that of the layer."""
        if isinstance(grid, WeightPlan):
            return replace(self, weights={**self.weights, slot[0]: rounded_weight(module, grid)})
        return replace(self, grids={**self.grids, slot: ActivationGrid.of(grid.qparams())})


FLOAT = QuantState()
"""Nothing is rounded."""


def slots(name: str, layer: LayerPlan) -> list[Slot]:
    """What a layer's plan rounds, in the order in which it is computed."""
    found = [(name, index) for index, grid in enumerate(layer.inputs) if grid is not None]
    found += [(name, WEIGHT)] * (layer.weight is not None)
    return found + [(name, OUTPUT)] * (layer.output is not None)


def grid_of(layer: LayerPlan, slot: Slot) -> TensorPlan | WeightPlan:
    """The grid at a slot that `slots` gave."""
    index = slot[1]
    grid = layer.weight if index == WEIGHT else layer.output if index == OUTPUT else layer.inputs[index]
    assert grid is not None
    return grid


@dataclass(frozen=True)
class _Step:
    """Computes `node`, or rounds what `slot` says; `reads` are the values it takes, `writes` the one it gives."""

    node: fx.Node
    slot: Slot | None
    reads: tuple[_Key, ...]
    writes: _Key


class Replay:
    """The steps of a folded graph.

    Law: ``run(run(start(x), 0, i, p), i, end, p)`` gives the same logits for every `i`.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps = _steps(graph)
        self.end = len(self.steps)
        self._result: fx.Node = next(layer_inputs(node)[0] for node in graph.graph.nodes if node.op == "output")
        self._dead = _last_uses(self.steps, self._result)
        self._computes = {step.writes: i for i, step in enumerate(self.steps) if step.slot is None}
        self._rounds = {step.slot: i for i, step in enumerate(self.steps) if step.slot is not None}
        self._nodes = {name_of(node): node for node, _ in layers(graph)}
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        self._modules = {target: _not_in_place(graph.get_submodule(target)) for target in targets}

    def position(self, slot: Slot) -> int:
        """The first step whose result a grid at `slot` changes."""
        return self._computes[self._nodes[slot[0]]] if slot[1] == WEIGHT else self._rounds[slot]

    def first_use(self, parameter: Tensor) -> int | None:
        """The first step that reads the memory of a parameter of the model; None where none does."""
        return self._reads.get(parameter.untyped_storage().data_ptr())

    @cached_property
    def _reads(self) -> dict[int, int]:
        """The memory of each tensor that the graph holds -> the first step that reads it."""
        found: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for tensor in _held(self.graph, step.node) if step.slot is None else ():
                found.setdefault(tensor.untyped_storage().data_ptr(), i)
        return found

    def output_of(self, name: str) -> tuple[int, _Key]:
        """The step after which a layer's output is there, rounded and behind its fused activation, and its key."""
        step = self._rounds[name, OUTPUT]
        return step + 1, self.steps[step].writes

    def start(self, images: Tensor) -> State:
        """The state before the first step."""
        return {next(node for node in self.graph.graph.nodes if node.op == "placeholder"): images}

    def logits(self, state: State) -> Tensor:
        """The result, in the state after the last step."""
        result: Tensor = state[self._result]
        return result

    @torch.inference_mode()
    def run(self, state: State, begin: int, end: int, point: QuantState = FLOAT) -> State:
        """The state before step `end`, from that before step `begin`, which stays as it is."""
        values = dict(state)
        for i in range(begin, end):
            step = self.steps[i]
            values[step.writes] = self._value(step, values, point)
            for key in self._dead[i]:
                values.pop(key, None)
        return values

    def _value(self, step: _Step, values: State, point: QuantState) -> Any:
        if step.slot is not None:
            grid, value = point.grids.get(step.slot), values[step.reads[0]]
            return value if grid is None else rounded(value, grid)
        node = step.node
        if node.op == "placeholder":
            return values[node]
        if node.op == "get_attr":
            return attribute(self.graph, node)
        args, kwargs = _arguments(self.graph, node, values)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if callable(node.target):
            return node.target(*args, **kwargs)
        module = self._modules[node.target]
        weight = point.weights.get(name_of(node))
        if weight is None:
            return module(*args, **kwargs)
        return torch.func.functional_call(module, {"weight": weight}, args, kwargs)


def _held(graph: Graph, node: fx.Node) -> list[Tensor]:
    """The tensors of the model that a node computes with."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    return [attribute(graph, node)] if node.op == "get_attr" else []


def _not_in_place(module: nn.Module) -> nn.Module:
    """The module, or a copy that leaves its input, which may be in a state that is kept, as it is."""
    if not getattr(module, "inplace", False):
        return module
    copied = copy.copy(module)
    copied.inplace = False  # type: ignore[assignment]
    return copied


def _arguments(graph: Graph, node: fx.Node, values: State) -> tuple[Any, Any]:
    """A layer takes its rounded inputs: one tensor may be taken twice, on two grids."""
    if not is_layer(graph, node):
        return fx.node.map_arg((node.args, node.kwargs), lambda old: values[old])
    inputs = iter(range(len(layer_inputs(node))))
    return fx.node.map_arg(
        (node.args, node.kwargs), lambda old: values[node, next(inputs)] if old.meta["tensor"] else values[old]
    )


def _steps(graph: Graph) -> list[_Step]:
    fused = fused_activations(graph)
    producer = {activation: layer for layer, activation in fused.items()}
    steps: list[_Step] = []
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        reads: list[_Key] = [*node.all_input_nodes]
        if is_layer(graph, node):
            sources = layer_inputs(node)
            steps += [_Step(node, (name_of(node), i), (source,), (node, i)) for i, source in enumerate(sources)]
            reads = [
                *(old for old in node.all_input_nodes if not old.meta["tensor"]),
                *((node, i) for i in range(len(sources))),
            ]
        steps.append(_Step(node, None, tuple(reads), node))
        if is_layer(graph, node) and node not in fused:
            steps.append(_Step(node, (name_of(producer.get(node, node)), OUTPUT), (node,), node))
    return steps


def _last_uses(steps: list[_Step], result: fx.Node) -> list[list[_Key]]:
    """For each step the values that no later step reads."""
    last: dict[_Key, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys((*step.reads, step.writes), i)
    last.pop(result)
    dead: list[list[_Key]] = [[] for _ in steps]
    for key, i in last.items():
        dead[i].append(key)
    return dead
