"""New ops in an exported program."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["insert", "insert_like", "sizes_of"]


def insert(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new op before `like`, which belongs to the same module of the model."""
    return insert_like(graph, like, like, target, *args, **kwargs)


def insert_like(graph: fx.Graph, like: fx.Node, place: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new op before `place`, of the module of the model that `like` belongs to; `kwargs` are plain values."""
    with graph.inserting_before(place):
        node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    for key in ("val", "more"):  # the values for two images, or any number of them, and for three
        if all(key in each.meta for each in [like, *node.all_input_nodes]):
            values = fx.node.map_arg(args, lambda each: each.meta[key])  # noqa: B023
            with like.meta[key].fake_mode:
                node.meta[key] = target(*values, **kwargs)
    return node


def sizes_of(node: fx.Node) -> list[int] | None:
    """The sizes to give a reshape for the shape of a tensor; None where more than its first axis is unknown."""
    value, more = node.meta["val"].shape, node.meta.get("more", node.meta["val"]).shape
    fixed = all(isinstance(size, int) and size == other for size, other in zip(value[1:], more[1:], strict=True))
    return [-1, *(int(size) for size in value[1:])] if fixed else None
