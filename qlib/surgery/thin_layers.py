"""The tensors and sizes of a graph's layers, changed to those of what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qlib.graph import ops
from qlib.graph.coordinates import ChannelClasses
from qlib.graph.coordinates_unions import varying
from qlib.graph.ir import Graph, layer_inputs, layers
from qlib.graph.norms import BATCH_NORMS

__all__ = ["thin_layers", "thin_tensors"]

Labels = Tensor | Sequence[Tensor]


def thin_tensors(graph: Graph, classes: ChannelClasses, keep: Tensor) -> None:
    """Replaces, in place, the parameters and buffers of a graph by what is kept of them."""
    made: dict[int, Tensor] = {}
    for name, tensor in (*_named(graph, "parameters"), *_named(graph, "buffers")):
        axes = [axis for axis in range(tensor.ndim) if (classes.of(name, axis)) is not None]
        if not axes:
            continue
        if id(tensor) not in made:
            value = tensor.detach()
            for axis in axes:
                value = value.index_select(axis, keep[classes.of(name, axis)].nonzero().flatten().to(value.device))
            same = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if same else value
        path, _, last = name.rpartition(".")
        owner: Any = graph.get_submodule(path)
        (owner._parameters if last in owner._parameters else owner._buffers)[last] = made[id(tensor)]


def _named(graph: Graph, what: str) -> list[tuple[str, Tensor]]:
    return list(getattr(graph, f"named_{what}")(remove_duplicate=False))


def thin_layers(graph: Graph, values: Mapping[str, Labels], keep: Tensor) -> None:
    """Sets, in place, the sizes that modules know to those of their inputs and outputs.

    `values` has the classes of each node's activation before; the tensors are thinned already.
    """
    seen: set[nn.Module] = set()
    for node, module in layers(graph):
        if module not in seen:
            seen.add(module)
            _resize(module, [values[each.name] for each in layer_inputs(node)], values[node.name], keep)


def _resize(module: nn.Module, inputs: Sequence[Labels], output: Labels, keep: Tensor) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        channels, outputs = (_size(labels, 1, keep) for labels in (inputs[0], output))
        if module.groups > 1:
            module.groups = channels * module.groups // module.in_channels
        module.in_channels, module.out_channels = channels, outputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = len(module.running_mean)  # type: ignore[arg-type]
    elif isinstance(module, nn.LayerNorm):
        last = range(-len(module.normalized_shape), 0)
        module.normalized_shape = tuple(_size(inputs[0], axis, keep) for axis in last)
    elif isinstance(module, nn.GroupNorm):
        _resize_group_norm(module, inputs[0], keep)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, ops.MaskedSoftmax) and module.shape is not None:
        assert isinstance(inputs[0], Tensor)
        rows = inputs[0].reshape(-1, *module.shape)
        module.shape = tuple(_size(rows, axis, keep) for axis in range(1, rows.ndim))
    elif isinstance(module, ops.Function) and module.title == "rms_norm":
        module.args = (module.args[0], [_size(inputs[0], -1, keep)], *module.args[2:])


def _resize_group_norm(module: nn.GroupNorm, labels: Labels, keep: Tensor) -> None:
    """Either the groups are whole, and there are fewer of them, or each has lost the same channels."""
    assert isinstance(labels, Tensor)
    channels = labels.select(0, 0).flatten(1)[:, 0] if labels.ndim > 2 else labels[0]
    stay = keep[channels].view(module.num_groups, -1)
    whole = bool((stay == stay[:, :1]).all())
    module.num_groups = int(stay[:, 0].sum()) if whole else module.num_groups
    module.num_channels = int(stay.sum())


def _size(labels: Labels, axis: int, keep: Tensor) -> int:
    """What is kept of the size of an axis."""
    assert isinstance(labels, Tensor)
    axis %= labels.ndim
    if axis not in varying(labels):
        return labels.shape[axis]
    return int(keep[labels[tuple(slice(None) if i == axis else 0 for i in range(labels.ndim))]].sum())
