"""The rules of layers that have weights, and of norms: see `coordinates_rules`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlib.graph.coordinates_base import Ties, along, first, held_names, opaque, spread
from qlib.graph.coordinates_unions import varying

__all__ = ["batch_norm", "conv", "embedding", "group_norm", "instance_norm", "layer_norm", "linear", "rms_norm"]

# --- layers with weights ----------------------------------------------------------------------------------------------


def linear(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """In: the last axis ~ weight axis 1, out: axis 0. One that mixes positions of each channel keeps its shape."""
    assert isinstance(module, nn.Linear)
    labels = inputs[0]
    if varying(labels) not in ([], [labels.ndim - 1]):
        return first(labels, -1).expand(tuple(shape))
    out = ties.outputs(module.out_features)
    ties.attach("weight", 1, along(ties, labels, -1))
    ties.attach("weight", 0, out)
    ties.attach("bias", 0, out)
    return spread(out, -1, shape)


def conv(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """In: axis 1 ~ weight axis 1, out: axis 0; transposed the other way round.

    Of several groups, each is one class with all its inputs and outputs, so that `groups` becomes smaller.
    """
    assert isinstance(module, nn.modules.conv._ConvNd)
    if varying(inputs[0]) not in ([], [1]):
        return opaque(ties, module, inputs, shape)
    found, out, groups = along(ties, inputs[0], 1), ties.outputs(module.out_channels), module.groups
    rows, columns = (found, out) if module.transposed else (out, found)
    ties.attach("weight", 0, rows)
    ties.attach("bias", 0, out)
    if groups == 1:
        ties.attach("weight", 1, columns)
    else:
        ties.unite(found.reshape(groups, -1), out.reshape(groups, -1)[:, :1])
        ties.unite(out.reshape(groups, -1), out.reshape(groups, -1)[:, :1])
    return spread(out, 1, shape)


def embedding(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    out = ties.outputs(shape[-1])
    ties.attach("weight", 1, out)
    return spread(out, -1, shape)


# --- norms ------------------------------------------------------------------------------------------------------------

_TENSORS_OF_NORMS = ("weight", "bias", "running_mean", "running_var")


def batch_norm(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    if varying(inputs[0]) in ([], [1]):
        found = along(ties, inputs[0], 1)
        for name in _TENSORS_OF_NORMS:
            ties.attach(name, 0, found)
    return inputs[0]


def layer_norm(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    labels, before = inputs[0], inputs[0].ndim - len(module.normalized_shape)
    for axis in varying(labels):
        if axis >= before:
            ties.counts(labels)
            for name in ("weight", "bias"):
                ties.attach(name, axis - before, along(ties, labels, axis))
    return labels


def group_norm(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Groups stay of one size: whole ones go, or the same channels of each, whichever leaves more classes."""
    assert isinstance(module, nn.GroupNorm)
    if varying(inputs[0]) not in ([], [1]):
        return opaque(ties, module, inputs, shape)
    found = along(ties, inputs[0], 1)
    groups = ties.settled(found.reshape(module.num_groups, -1))
    if 1 in varying(groups):
        ties.counts(groups)
    for name in ("weight", "bias"):
        ties.attach(name, 0, found)
    return inputs[0]


def instance_norm(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    if varying(inputs[0]) in ([], [1]):
        for name in held_names(module):
            ties.attach(name, 0, along(ties, inputs[0], 1))
        return inputs[0]
    return opaque(ties, module, inputs, shape)


def rms_norm(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    last = inputs[0].ndim - 1
    if varying(inputs[0]) == [last]:
        ties.counts(inputs[0])
        for name in held_names(module):
            ties.attach(name, 0, along(ties, inputs[0], last))
    return inputs[0]
