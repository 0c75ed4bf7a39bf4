"""The qdq lowering: the model that ONNX export writes, from the exact one and so from the same integers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qlib.graph.ir import attribute, layer_inputs
from qlib.lower.base import ActivationGrid, ActivationGrids, ExactLayer
from qlib.lower.exact import activation_grid
from qlib.lower.ops.quantize import Dequantize, Quantize
from qlib.lower.qdq_layer import FromCodes, QdqLayer, ToCodes

__all__ = ["lower_qdq"]


def lower_qdq(exact: fx.GraphModule) -> fx.GraphModule:
    """The model `exact`, of `lower_exact`, as float layers between dequantize and quantize; layers keep their names.

    Between layers, and through views, transposes, max pools and the like, travel codes of type uint8 (uint16 for
    grids of more than 8 bits). In torch it rounds as float layers do; ONNX Runtime computes it in integers.
    """
    builder = _Builder(exact)
    for node in exact.graph.nodes:
        builder.add(node)
    lowered = fx.GraphModule(builder.root, builder.new)
    lowered.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered.eval()


@dataclass
class _Builder:
    exact: fx.GraphModule
    new: fx.Graph = field(default_factory=fx.Graph)
    root: dict[str, object] = field(default_factory=dict)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def add(self, node: fx.Node) -> None:
        """Writes one node."""
        if node.op == "get_attr":
            self.root[str(node.target)] = attribute(self.exact, node)
        elif node.op == "call_module":
            module = self.exact.get_submodule(str(node.target))
            source = next(iter(layer_inputs(node)), None)  # what is made of the number of images alone has none
            if isinstance(module, Quantize) and source is not None and source.op == "get_attr":
                self.values[node] = self._constant(node, module, attribute(self.exact, source))
                return
            if isinstance(module, Quantize) and source is not None:
                self.root[str(node.target)] = self._quantize(node, source)
            else:
                inputs = tuple(map(activation_grid, layer_inputs(node)))
                self.root[str(node.target)] = _layer(module, inputs, activation_grid(node))
        if _pads(self.exact, node):
            self.values[node] = self._move_values(node)
        else:
            self.values[node] = self.new.node_copy(node, lambda old: self.values[old])

    def _quantize(self, node: fx.Node, source: fx.Node) -> nn.Module:
        grid = activation_grid(node)
        module = None if source.op != "call_module" else self.exact.get_submodule(str(source.target))
        assert grid is not None
        return ToCodes(grid, again=isinstance(module, Dequantize))

    def _constant(self, node: fx.Node, quantize: Quantize, value: Tensor) -> fx.Node:
        """The codes of an operand that the model holds."""
        grid = activation_grid(node)
        assert grid is not None
        self.root[str(node.target)] = grid.codes(quantize(value))
        return self.new.get_attr(str(node.target))

    def _move_values(self, node: fx.Node) -> fx.Node:
        """Moves float values instead of codes: it fills with zeros, of which the code is another number."""
        (source,) = layer_inputs(node)
        grid = activation_grid(source)
        assert grid is not None
        values = self._call(f"dequantize_before_{node.name}", FromCodes(grid), self.values[source])
        moved = self.new.node_copy(node, lambda old: values if old is source else self.values[old])
        return self._call(f"quantize_after_{node.name}", ToCodes(grid), moved)

    def _call(self, target: str, module: nn.Module, value: fx.Node) -> fx.Node:
        self.root[target] = module
        return self.new.call_module(target, (value,))


def _layer(module: nn.Module, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
    """What stands for a module of the exact model: on codes where that one is on centered codes."""
    if isinstance(module, Dequantize):
        assert inputs[0] is not None
        return FromCodes(inputs[0])
    if isinstance(module, ExactLayer):
        return module.qdq(inputs, output)
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and output and output.dtype == torch.uint16:
        return QdqLayer(module, inputs, output)  # ONNX Runtime has max pools of bytes and of floats
    return module  # it moves values or takes their maximum: on codes as on values


def _pads(exact: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node fills codes with zeros."""
    if activation_grid(node) is None:
        return False
    fills = getattr(node.target, "__name__", "") == "pad" and node.args[2:] in ((), ("constant",))
    return fills and _size(node) > _size(layer_inputs(node)[0])


def _size(node: fx.Node) -> int:
    return torch.Size(node.meta["shape"]).numel()
