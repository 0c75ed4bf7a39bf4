"""Batch-norm folded into the layer before it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
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
        if kind_of(layer) not in ("conv", "conv_transpose", "linear") or norm.running_mean is None:
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
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter) and isinstance(norm.running_mean, torch.Tensor)
    groups = getattr(layer, "groups", 1)
    transposed = kind_of(layer) == "conv_transpose"
    # In double: folding must not cost more than one rounding of the weights.
    values = [t.double() if isinstance(t, torch.Tensor) else None for t in (
        weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    if transposed and groups > 1:  # [in, out / groups, ...] -> [in / groups, out, ...]
        assert values[0] is not None
        parts = values[0].unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
        new_weight, new_bias = fuse_conv_bn_weights(parts, *values[1:4], norm.eps, *values[4:], transpose=True)  # type: ignore[arg-type]
        new_weight = new_weight.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    else:
        new_weight, new_bias = fuse_conv_bn_weights(*values[:4], norm.eps, *values[4:], transpose=transposed)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(new_weight.to(weight.dtype))
    layer.bias = nn.Parameter(new_bias.to(weight.dtype))
