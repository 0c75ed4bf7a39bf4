"""Thinning: a graph without some of its channel classes, smaller in fact and not only zero.

References: Distiller's `thinning` did this by lists of dependent layers; here `channel_classes` knows them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlib.errors import ModelError
from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.graph.ir import Graph
from qlib.surgery.recipe import Recipe
from qlib.surgery.thin_layers import thin_layers, thin_tensors
from qlib.surgery.thin_moves import thin_moves, thinned

__all__ = ["masked", "recipe_of", "replay", "thin"]

_META = "thinning"
"""Where a thinned graph keeps its recipe."""


@torch.no_grad()
def thin(graph: Graph, removed: Iterable[int], classes: ChannelClasses | None = None) -> Graph:
    """A new graph without the classes `removed` of a captured graph; `classes` are its own, if they are known already.

    Laws: it computes what the graph computes whose entries of these classes are 0, if they are neutral; without any
    class it is the graph; thinned twice it is thinned by both. Names stay. Numbers that the model derived from its
    widths, as the scale of attention, stay those that they were. It knows its recipe: `recipe_of`.

    Raises:
        ModelError: a layer would be left without channels.

    >>> from torch import nn
    >>> from qlib.graph.capture import capture
    >>> graph = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(2, 3, 1, 1))
    >>> small = thin(graph, [1, 3])
    >>> getattr(small, "0"), getattr(small, "2")
    (Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1)), Conv2d(2, 2, kernel_size=(1, 1), stride=(1, 1)))
    >>> recipe_of(small).entries[0]
    RecipeEntry(name='0.weight', axis=0, size=4, kept=(1, 3))
    """
    classes = channel_classes(graph) if classes is None else classes
    keep = classes.keeps(removed)
    _refuse_empty(classes, keep)
    small = copy.deepcopy(graph)
    thin_tensors(small, classes, keep)
    thin_layers(small, classes.values, keep)
    thin_moves(small, classes.values, keep)
    for node in small.graph.nodes:
        labels = classes.values.get(node.name)
        if isinstance(labels, Tensor) and "shape" in node.meta:
            node.meta["shape"] = tuple(thinned(labels, keep).shape)
    small.delete_all_unused_submodules()
    recipe = Recipe.of(classes, keep)
    before = recipe_of(graph)
    small.meta[_META] = recipe if before is None else before.then(recipe)
    return small


def _refuse_empty(classes: ChannelClasses, keep: Tensor) -> None:
    empty = next((each.name for each in classes.axes if not bool(keep[each.classes].any())), None)
    parts = (part for value in classes.values.values() for part in ([value] if isinstance(value, Tensor) else value))
    if empty is not None or any(0 in thinned(part, keep).shape for part in parts if part.numel()):
        layer = "a part of a concatenation" if empty is None else f"layer {empty.rpartition('.')[0] or empty!r}"
        raise ModelError(f"{layer} would be left without channels; at least one of them must stay")


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe by which a model was thinned; None for one that was not."""
    found = model.meta.get(_META) if isinstance(model, Graph) else None
    return found if isinstance(found, Recipe) else None


def replay(graph: Graph, recipe: Recipe) -> Graph:
    """The graph thinned by a recipe that was made of another one of the same model.

    Raises:
        CheckpointError: the recipe is for another model, or the graph is thinned already.
    """
    classes = channel_classes(graph)
    small = thin(graph, recipe.removed(graph, classes), classes)
    recipe.check(recipe_of(small))
    return small


@torch.no_grad()
def masked(state: Mapping[str, Tensor], classes: ChannelClasses, removed: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a graph, copied, with 0 in the entries of some classes: what thinning leaves out.

    >>> classes = ChannelClasses(0, (), torch.ones(1), torch.ones(1), {})
    >>> masked({"weight": torch.ones(2)}, classes, [])
    {'weight': tensor([1., 1.])}
    """
    keep, found = classes.keeps(removed), {name: value.clone() for name, value in state.items()}
    for each in classes.axes:
        value = found[each.name]
        shape = [-1 if axis == each.axis else 1 for axis in range(value.ndim)]
        value *= keep[each.classes].view(shape).to(value.device)
    return found
