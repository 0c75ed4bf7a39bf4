"""The trainable lowering: the float graph with its batch-norms, whose tensors pass through quantizers while it trains.

It computes what the exact lowering of `convert` computes: quantizers are any modules that put a tensor on a grid and
tell which one that is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qlib.graph import Graph, deployed_copy, fold_batch_norm, fold_copy, fused_activations
from qlib.graph.formulas import settle_layer
from qlib.graph.ir import is_layer, layer_inputs, name_of
from qlib.graph.walk import keeps_grid
from qlib.graph.weights import swap_channels
from qlib.lower.fake import fake_quantize
from qlib.lower.fit import fit
from qlib.quant.affine import QParams, range_of_grid
from qlib.quant.plan import Plan, WeightPlan

__all__ = [
    "ActivationQuantizer",
    "FixedActivation",
    "TrainableLayer",
    "WeightQuantizer",
    "connect",
    "convert",
    "nonzero",
    "prepare_qat",
    "trainable_layers",
]


class WeightQuantizer(nn.Module):
    """Puts a weight ``[out, in / groups, ...]`` on a grid, in each step anew.

    Law: in evaluation mode `forward` gives values of `grid(weight)`, whose scale it also returns. Unless `folds`, the
    grid is symmetric and restricted, so that it survives a batch-norm with a negative factor.
    """

    folds = False
    """Whether it is given the weight with the batch-norm after it multiplied in, as it is deployed."""

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded weight, and the scale ``[]`` or ``[out]``, detached."""
        raise NotImplementedError

    def grid(self, weight: Tensor) -> QParams:
        """The grid, per tensor or with axis 0 per output channel."""
        raise NotImplementedError


class ActivationQuantizer(nn.Module):
    """Puts an activation on a grid, which may be learned.

    Law: in evaluation mode `forward` gives values of the grid `params`, and of one with zero point z and a `scale` that
    is a tensor of its own.
    """

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The rounded activation."""
        raise NotImplementedError

    @property
    def params(self) -> QParams:
        """The grid, per tensor."""
        raise NotImplementedError


class FixedActivation(ActivationQuantizer):
    """Rounds to a grid that does not change: that of a softmax, or of an operand that the model holds."""

    def __init__(self, params: QParams) -> None:
        super().__init__()
        self.spec, self.low, self.high = params.spec, int(params.low), int(params.high)
        self.register_buffer("scale", params.scale.clone())
        self.register_buffer("zero_point", params.zero_point.clone())

    zero_point: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.low, self.high)

    @property
    def params(self) -> QParams:
        return QParams(self.scale, self.zero_point, self.spec)


class TrainableLayer(nn.Module):
    """A layer, with the batch-norm and the activation that the folded graph computes in it, and its quantizers.

    Without quantizers it is the float layer. `source` is the quantizer of what arrives: together with the weight's it
    is the grid of the accumulator, to which the bias is rounded.
    """

    def __init__(self, module: nn.Module, norm: nn.Module | None, activation: nn.Module | None, inputs: int) -> None:
        super().__init__()
        self.module, self.norm, self.activation = module, norm, activation
        self._kernel = [_settled(module)]  # in a list: its tensors are not those that train
        self.inputs = nn.ModuleList(nn.Identity() for _ in range(inputs))
        self.weight: WeightQuantizer | None = None
        self.output: ActivationQuantizer | None = None
        self.gradient: nn.Module | None = None
        self.source: list[ActivationQuantizer | None] = [None]  # in a list: it is part of another layer

    def forward(self, *args: Any) -> Any:
        grids = iter(self.inputs)
        values = [next(grids)(arg) if isinstance(arg, Tensor) else arg for arg in args]
        y = self.module(*values) if self.weight is None else self._weighted(*values)
        if self.norm is not None and self.weight is None:
            y = self.norm(y)
        if self.gradient is not None:
            y = self.gradient(y)
        # The bounds of an output's grid are those of a ReLU; those of a ReLU6 lie within it.
        if self.activation is not None and (self.output is None or isinstance(self.activation, nn.ReLU6)):
            y = self.activation(y)
        return y if self.output is None else self.output(y)

    def _weighted(self, *values: Any) -> Tensor:
        """The convolution or product with the rounded weight, and the batch-norm after it."""
        rounded, scale = self.rounded_weight()
        own = getattr(self.module, "bias", None)
        parameters = {"weight": rounded} | ({"bias": own} if isinstance(own, Tensor) else {})
        arriving, (kernel,) = self.arriving, self._kernel
        if self.norm is None:
            if isinstance(own, Tensor) and arriving is not None:
                parameters["bias"] = own + _rounding_error(own.detach(), arriving.scale.detach() * scale)
            y: Tensor = torch.func.functional_call(kernel, parameters, values)
            return y
        y = torch.func.functional_call(kernel, parameters, values)
        shift = self.norm.bias
        if arriving is None or not isinstance(shift, Tensor):
            return self.norm(y)  # type: ignore[no-any-return]
        with torch.no_grad():
            gain, mean = self.gain(), self.norm.running_mean
            assert gain is not None
            assert isinstance(mean, Tensor)
            bias = shift + ((own if isinstance(own, Tensor) else 0.0) - mean) * gain
            error = _rounding_error(bias, arriving.scale * scale * nonzero(gain).abs())
        return torch.func.functional_call(self.norm, {"bias": shift + error}, (y,))  # type: ignore[no-any-return]

    @property
    def arriving(self) -> ActivationQuantizer | None:
        """The quantizer that gave the first input its grid."""
        own = self.inputs[0] if len(self.inputs) else None
        return own if isinstance(own, ActivationQuantizer) else self.source[0]

    @torch.no_grad()
    def gain(self) -> Tensor | None:
        """What the batch-norm multiplies each output channel by, with its running variance; None without one."""
        if self.norm is None:
            return None
        variance, weight = self.norm.running_var, self.norm.weight
        assert isinstance(variance, Tensor)
        eps = self.norm.eps
        assert isinstance(eps, float)
        inverse = torch.rsqrt(variance + eps)
        return inverse * weight if isinstance(weight, Tensor) else inverse

    def rounded_weight(self) -> tuple[Tensor, Tensor]:
        """The rounded weight in the layer's layout, and its scale before the batch-norm, ``[]`` or ``[out]``."""
        assert self.weight is not None
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        gain = self.gain() if self.weight.folds else None
        weight = swap_channels(self.module, weight)
        if gain is None:
            rounded, scale = self.weight(weight)
            return swap_channels(self.module, rounded), scale
        gain = nonzero(gain)
        factor = gain.view(-1, *[1] * (weight.ndim - 1))
        rounded, scale = self.weight(weight * factor)
        return swap_channels(self.module, rounded / factor), scale / gain.abs()

    def weight_plan(self) -> WeightPlan:
        """The grid of the weight after folding, with explicit ranges."""
        assert self.weight is not None
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight, gain = swap_channels(self.module, weight.detach()), self.gain()
        if gain is not None and self.weight.folds:
            weight = weight * nonzero(gain).view(-1, *[1] * (weight.ndim - 1))
        params = self.weight.grid(weight)
        low, high = range_of_grid(params)
        if gain is not None and not self.weight.folds:
            factor = nonzero(gain).double().abs()
            low, high = low * factor, high * factor
        spec = replace(params.spec, axis=0 if low.ndim else None)
        return WeightPlan(spec, "learned", tuple(low.reshape(-1).tolist()), tuple(high.reshape(-1).tolist()))


def nonzero(gain: Tensor) -> Tensor:
    """A gain with 1 for 0, which fresh batch-norms may have: all grids hold the zeros that it makes of a weight.

    >>> nonzero(torch.tensor([0.0, -0.5]))
    tensor([ 1.0000, -0.5000])
    """
    return torch.where(gain == 0, torch.ones_like(gain), gain)


def _settled(module: nn.Module) -> nn.Module:
    """The layer itself, or where it computes its weight or bias a copy that can be given others."""
    if parametrize.is_parametrized(module):
        module = copy.deepcopy(module)
        settle_layer(module)
    return module


def _rounding_error(value: Tensor, scale: Tensor) -> Tensor:
    return torch.round(value / scale) * scale - value


def prepare_qat(graph: Graph) -> fx.GraphModule:
    """A graph over the same parameters as `graph`, which is not folded, whose layers can be given quantizers.

    A layer stands for itself and for the batch-norm and activation that folding and the integer kernels take into it;
    until it has quantizers it computes what `graph` computes.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    output = new.output(new.graph_copy(graph.graph, nodes))
    output.meta = dict(next(iter(reversed(graph.graph.nodes))).meta)
    lowered: fx.GraphModule = fx.GraphModule(graph, new)
    norms = _folding_norms(graph)
    for old, norm in norms.items():
        nodes[norm].replace_all_uses_with(nodes[old])
    for norm in norms.values():
        lowered.graph.erase_node(nodes[norm])
    fused = fused_activations(lowered)
    of_new = {node: old for old, node in nodes.items()}
    for node in list(lowered.graph.nodes):
        if not is_layer(lowered, node) or keeps_grid(lowered, node):
            continue
        follower, relu = norms.get(of_new[node]), fused.get(node)
        layer = TrainableLayer(
            lowered.get_submodule(str(node.target)),
            None if follower is None else graph.get_submodule(str(follower.target)),
            None if relu is None else lowered.get_submodule(str(relu.target)),
            len(layer_inputs(node)),
        )
        node.target = f"trainable.{node.name}"
        lowered.add_submodule(node.target, layer)
        if relu is not None:
            relu.replace_all_uses_with(node)
            lowered.graph.erase_node(relu)
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered


def _folding_norms(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Layer -> the batch-norm that folding takes into it, as nodes of `graph`."""
    folded = fold_copy(graph).folded
    by_name = {name_of(node): node for node in graph.graph.nodes if "name" in node.meta}
    return {by_name[layer]: by_name[norm] for norm, layer in folded.items()}


def trainable_layers(lowered: fx.GraphModule) -> Iterator[tuple[str, TrainableLayer]]:
    """Name and module of each layer, in execution order."""
    for node in lowered.graph.nodes:
        layer = lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, TrainableLayer):
            yield name_of(node), layer


def connect(lowered: fx.GraphModule) -> None:
    """Tells each layer which quantizer gave its first input its grid; to be called when quantizers have changed."""
    grids: dict[fx.Node, ActivationQuantizer | None] = {}
    for node in lowered.graph.nodes:
        sources = layer_inputs(node) if node.op not in ("placeholder", "get_attr") else []
        source = grids.get(sources[0]) if sources else None
        layer = lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, TrainableLayer):
            layer.source[0] = source
            grids[node] = layer.output
        else:
            grids[node] = source if keeps_grid(lowered, node) else None


@torch.no_grad()
def convert(graph: Graph, lowered: fx.GraphModule, plan: Plan) -> tuple[Graph, Plan]:
    """The folded graph and the plan whose exact lowering gives the integers that `lowered` (of `graph`) stands for.

    `plan` is that from which the quantizers were made; what they have learned since replaces its grids.
    """
    folded = deployed_copy(graph)
    plans = dict(plan.layers)
    targets = {name_of(node): str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for name, layer in trainable_layers(lowered):
        learned = plans[name]
        if layer.weight is not None:
            rounded, _ = layer.rounded_weight()
            folded.get_submodule(targets[name]).weight.copy_(rounded)  # type: ignore[operator]
            learned = replace(learned, weight=layer.weight_plan())
        grids = [grid.params if isinstance(grid, ActivationQuantizer) else None for grid in layer.inputs]
        plans[name] = learned.with_grids(grids, layer.output.params if layer.output is not None else None, "learned")
    fold_batch_norm(folded)
    return folded, fit(folded, replace(plan, layers=plans))[0]
