"""Batch-norm folded into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from qlib.graph.ir import Graph, kind_of, layer_inputs, name_of

__all__ = ["fold_batch_norm"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)


def fold_batch_norm(graph: Graph) -> dict[str, str]:
    """Folds, in place, each batch-norm that alone follows a convolution or linear layer; returns batch-norm -> layer.

    ``W' = W * gamma / sqrt(var + eps)``, ``b' = beta + (b - mean) * gamma / sqrt(var + eps)``, per output channel
    (Jacob et al. 2018, section 3.2). One that follows something else stays, and is computed in float.
    """
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    folded: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := graph.get_submodule(str(node.target)), _BATCH_NORMS):
            continue
        (source,) = layer_inputs(node)
        if source.op != "call_module" or len(source.users) > 1 or calls[str(source.target)] > 1:
            continue
        layer = graph.get_submodule(str(source.target))
        kind = kind_of(layer)
        if kind not in ("conv", "conv_transpose", "linear") or norm.running_mean is None:
            continue
        if kind == "linear" and len(node.meta["shape"]) != 2:  # the norm is over axis 1, the layer's outputs are last
            continue
        _fold(layer, norm)
        folded[name_of(node)] = name_of(source)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Replaces the layer's weight and bias by those of layer and batch-norm together."""
    weight, mean, variance = layer.weight, norm.running_mean, norm.running_var
    assert isinstance(weight, Tensor)
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    # In double: folding must not cost more than one rounding of the weights.
    factor = _double(norm.weight, 1.0) * torch.rsqrt(variance.double() + norm.eps)  # type: ignore[operator]
    bias = (_double(layer.bias, 0.0) - mean.double()) * factor + _double(norm.bias, 0.0)
    layer.weight = nn.Parameter((weight.double() * _per_output(layer, factor)).to(weight.dtype))
    layer.bias = nn.Parameter(bias.to(weight.dtype))


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
