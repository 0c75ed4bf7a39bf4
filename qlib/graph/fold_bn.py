"""Batch-norm folded into the layer before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, layer_inputs, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.norms import BATCH_NORMS
from qlib.graph.ops import ChannelAffine
from qlib.graph.weights import channel_axis

__all__ = ["fold_batch_norm"]


@torch.no_grad()
def fold_batch_norm(graph: Graph) -> dict[str, str]:
    """Folds, in place, each batch-norm that alone follows a convolution or linear layer; returns batch-norm -> layer.

    ``W' = W * gamma / sqrt(var + eps)``, ``b' = beta + (b - mean) * gamma / sqrt(var + eps)``, per output channel
    (Jacob et al. 2018, section 3.2). One that follows something else becomes a `ChannelAffine` of its own name.
    """
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    folded: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := graph.get_submodule(str(node.target)), BATCH_NORMS):
            continue
        (source,) = layer_inputs(node)
        if norm.running_mean is None:
            continue
        if calls.get(str(source.target), 0) == 1 and _absorbs(graph, source, node):
            layer = graph.get_submodule(str(source.target))
            gain, bias = _gain_and_bias(norm, getattr(layer, "bias", None))
            assert isinstance(layer.weight, Tensor)
            layer.weight = nn.Parameter((layer.weight.double() * _per_output(layer, gain)).to(layer.weight.dtype))
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
            folded[name_of(node)] = name_of(source)
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        else:
            _make_affine(graph, node, norm)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


def _make_affine(graph: Graph, node: fx.Node, norm: nn.Module) -> None:
    """A layer of its own in the place of a batch-norm, of ``[N, C, H, W]``: its input is reshaped to it, and back."""
    dtype = norm.running_mean.dtype
    assert isinstance(dtype, torch.dtype)
    gain, bias = _gain_and_bias(norm, None)
    graph.add_submodule(str(node.target), ChannelAffine(gain.to(dtype), bias.to(dtype)).eval())
    for call in [each for each in graph.graph.nodes if each.op == "call_module" and each.target == node.target]:
        shape = call.meta["shape"]
        if len(shape) != 4:
            before, plane = layer_inputs(call)[0], (shape[0], shape[1], math.prod(shape[2:]), 1)
            call.replace_input_with(before, _reshaped(graph, before, call, plane))
            back = _reshaped(graph, call, call.next, shape)
            call.meta["shape"] = plane
            call.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)  # noqa: B023


def _reshaped(graph: Graph, source: fx.Node, place: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    with graph.graph.inserting_before(place):
        node = graph.graph.call_function(torch.reshape, (source, [-1, *shape[1:]]))
    node.meta = {**source.meta, "name": f"{name_of(source)}.reshape", "tensor": True, "shape": shape}
    return node


def _absorbs(graph: Graph, source: fx.Node, node: fx.Node) -> bool:
    """Whether the layer `source` can take the batch-norm `node` into its weight."""
    if source.op != "call_module" or len(source.users) > 1:
        return False
    layer = graph.get_submodule(str(source.target))
    if not layer_kind(layer).affine:
        return False
    return channel_axis(layer) == 1 or len(node.meta["shape"]) == 2  # the norm is over axis 1


def _gain_and_bias(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each channel is multiplied by, and the bias after it, for an input that already has `bias`.

    In double: folding must not cost more than one rounding of the weights.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    gain = _double(norm.weight, 1.0) * torch.rsqrt(variance.double() + norm.eps)  # type: ignore[operator]
    return gain, (_double(bias, 0.0) - mean.double()) * gain + _double(norm.bias, 0.0)


def _double(value: Tensor | nn.Module | None, default: float) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.tensor(default, dtype=torch.float64)


def _per_output(layer: nn.Module, factor: Tensor) -> Tensor:
    """`factor`, one number for each output channel, shaped to multiply the weight of `layer`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    ones = [1] * (weight.ndim - 2)
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return factor.view(-1, 1, *ones)
    grouped = factor.view(layer.groups, -1)  # the weight is [in, out / groups, ...], group by group
    return grouped.repeat_interleave(weight.shape[0] // layer.groups, 0).view(weight.shape[0], -1, *ones)
