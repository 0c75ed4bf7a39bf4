"""Which coordinates each layer of a graph ties together: one rule for each kind of module, one for each function.

A rule is given the label tensors of a layer's inputs, ties labels and parameters, and returns those of the output.
Labels of an activation vary along one axis at most. What no rule knows is pinned: inputs, parameters and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from qlib.graph import coordinates_layers as of_layers
from qlib.graph import ops
from qlib.graph.coordinates_base import Rule, Ties, along, first, held_names, opaque, pinned, spread
from qlib.graph.coordinates_unions import varying
from qlib.graph.kinds import ELEMENTWISE
from qlib.graph.norms import BATCH_NORMS

__all__ = ["rule_of"]


def rule_of(module: nn.Module) -> Rule:
    """The rule of a layer: that of its class or, for a function, of its name; that which pins for what has none."""
    if isinstance(module, ops.Function):
        pointwise = torch.Tag.pointwise in getattr(module.function, "tags", ())
        return _FUNCTIONS.get(module.title, _function_by_element if pointwise else opaque)
    return next((rule for types, rule in _MODULES if isinstance(module, types)), opaque)


def _same(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return inputs[0]


# --- element by element -----------------------------------------------------------------------------------------------


def _by_element(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Labels at the same places are joined after broadcasting.

    An input with one element where others vary, as a gate over all channels has, is used for each of them: its own
    labels are pinned, and tie nothing.
    """
    shape = torch.broadcast_shapes(*(labels.shape for labels in inputs))  # type: ignore[no-untyped-call]
    wide = [labels[(None,) * (len(shape) - labels.ndim)] for labels in inputs]
    axes = {axis for labels in wide for axis in varying(labels)}
    full = [labels for labels in wide if all(labels.shape[axis] == shape[axis] for axis in axes)]
    for labels in wide:
        if not any(labels is each for each in full):
            ties.pin(labels)
    for labels in full[1:]:
        ties.unite(full[0], labels)
    return full[0].expand(shape) if full else pinned(shape)


def _function_by_element(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return _by_element(ties, module, [*inputs, *map(ties.held, held_names(module))], shape)


def _prelu(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    held = [ties.held(name) for name in held_names(module)]
    slopes = [spread(each, 1, [1, each.numel(), *[1] * (len(shape) - 2)]) for each in held]
    return _by_element(ties, module, [*inputs, *slopes], shape)


def _glu(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    halves = inputs[0].chunk(2, int(_given(module).get("dim", -1)))
    return _by_element(ties, module, halves, shape)


def _softmax(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """What a softmax sums over stays."""
    labels = inputs[0]
    dim: Any = module.dim if isinstance(module, nn.Softmax | ops.MaskedSoftmax) else _given(module)["dim"]
    if isinstance(module, ops.MaskedSoftmax):
        rows = labels if module.shape is None else labels.reshape(-1, *module.shape)
        _by_element(ties, module, [ties.settled(rows), ties.held("mask")], rows.shape)
    if int(dim) % labels.ndim in varying(labels):
        ties.pin(labels)
    return labels


# --- over positions and over channels ---------------------------------------------------------------------------------


def _per_channel(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Pools and resizes: each channel by itself."""
    if varying(inputs[0]) not in ([], [1]):
        return opaque(ties, module, inputs, shape)
    return spread(along(ties, inputs[0], 1), 1, shape)


def _patches(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """`im2col`: each channel gives one for each position in its window."""
    if varying(inputs[0]) not in ([], [1]):
        return opaque(ties, module, inputs, shape)
    found = along(ties, inputs[0], 1)
    return spread(found.repeat_interleave(shape[1] // len(found)), 1, shape)


def _reduced(of_zeros: bool) -> Rule:
    """A reduction over axes; `of_zeros`: zeros do not change it."""

    def rule(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        if len(inputs) > 1 or held_names(module):  # a maximum of two
            return _function_by_element(ties, module, inputs, shape)
        labels, dims = inputs[0], _given(module).get("dim")
        dims = range(labels.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        axes = {int(dim) % labels.ndim for dim in dims}
        if not axes.isdisjoint(varying(labels)):
            (ties.sums if of_zeros else ties.counts)(labels)
            return pinned(shape)
        keeps = len(shape) == labels.ndim
        places = (slice(None) if axis not in axes else slice(0, 1) if keeps else 0 for axis in range(labels.ndim))
        return labels[tuple(places)]

    return rule


def _concat(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    assert isinstance(module, ops.Concat)
    dim = module.dim % len(shape)
    axes = {dim, *(axis for labels in inputs for axis in varying(labels))}
    few = [labels[tuple(slice(None if i in axes else 1) for i in range(labels.ndim))] for labels in inputs]
    return torch.cat(few, dim).expand(tuple(shape))


def _stack(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    dim = int(_given(module).get("dim", 0)) % len(shape)
    return torch.stack(list(inputs), dim)


def _matmul(ties: Ties, module: nn.Module, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """``[..., i, k] @ [..., k, j]``: both sides' labels of k and of the axes before are joined; others pass."""
    assert isinstance(module, ops.MatMul)
    a, b = (ties.settled(labels) for labels in inputs)
    if min(a.ndim, b.ndim) < 2:
        return opaque(ties, module, inputs, shape)
    b = b.transpose(-2, -1) if module.transpose else b
    rank = max(a.ndim, b.ndim)
    a, b = (labels[(None,) * (rank - labels.ndim)] for labels in (a, b))
    if varying(a) == [rank - 1] or varying(b) == [rank - 2]:
        inner = along(ties, a, -1)
        ties.unite(inner, along(ties, b, -2))
        ties.sums(inner)
        return pinned(shape)
    for axis in range(rank - 2):
        if a.shape[axis] == b.shape[axis] > 1 and axis in (*varying(a), *varying(b)):
            ties.unite(along(ties, a, axis), along(ties, b, axis))
    a, b = first(a, -1), first(b, -2)
    passing, other = (a, b) if varying(a) else (b, a)
    if varying(other) != varying(passing):
        ties.pin(other)
    return passing.expand(tuple(shape)) if varying(passing) else opaque(ties, module, (a, b), shape)


# --- functions --------------------------------------------------------------------------------------------------------


def _given(module: nn.Module) -> dict[str, Any]:
    """The arguments of a function by their names."""
    assert isinstance(module, ops.Function)
    schema = getattr(module.function, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else ["input", "p", "dim", "eps"]
    return {**dict(zip(names, module.args, strict=False)), **module.kwargs}


_MODULES: tuple[tuple[tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.Linear,), of_layers.linear),
    ((nn.modules.conv._ConvNd,), of_layers.conv),
    ((nn.Embedding,), of_layers.embedding),
    ((*BATCH_NORMS, FrozenBatchNorm2d), of_layers.batch_norm),
    ((nn.LayerNorm,), of_layers.layer_norm),
    ((nn.GroupNorm,), of_layers.group_norm),
    (ELEMENTWISE, _same),
    ((ops.Add, ops.Mul), _by_element),
    ((ops.Concat,), _concat),
    ((ops.MatMul,), _matmul),
    ((nn.Softmax, ops.MaskedSoftmax), _softmax),
    ((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, ops.GlobalAvgPool), _per_channel),
)

_RESIZES = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
    upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa avg_pool1d avg_pool3d max_pool1d max_pool3d max_pool2d_with_indices adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d
"""

_AS_THEY_ARE = "to _to_copy normalize detach hardtanh log_sigmoid celu selu"
_STATISTICS = "mean amax amin max min var std prod logsumexp argmax"

_FUNCTIONS: dict[str, Rule] = {
    **dict.fromkeys(_RESIZES.split(), _per_channel),
    **dict.fromkeys(_AS_THEY_ARE.split(), _same),
    **dict.fromkeys(("sum", "norm", "linalg_vector_norm"), _reduced(of_zeros=True)),
    **dict.fromkeys(_STATISTICS.split(), _reduced(of_zeros=False)),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    "instance_norm": of_layers.instance_norm,
    "rms_norm": of_layers.rms_norm,
    "prelu": _prelu,
    "_prelu_kernel": _prelu,
    "glu": _glu,
    "im2col": _patches,
    "stack": _stack,
}
