"""Recipes in checkpoints: ours under `thinning`, Distiller's under `thinning_recipes`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlib.checkpoint.fields import NAME, Each, Record, check_fields
from qlib.checkpoint.fit import own_name
from qlib.checkpoint.unpickle import Inert
from qlib.errors import CheckpointError
from qlib.graph.capture import capture
from qlib.graph.formulas import settle
from qlib.graph.ir import Graph
from qlib.surgery.recipe import Recipe, RecipeEntry
from qlib.surgery.thin import recipe_of, replay
from qlib.values import whole

__all__ = ["THINNING", "recipe_in", "saved_recipe", "thinned_as", "trainable_graph"]

THINNING, DISTILLERS = "thinning", "thinning_recipes"
_LARGEST, _MOST_AXES = 10**8, 8
_INDEX = whole(0, _LARGEST)
_ENTRY = Record({"parameter": NAME, "axis": whole(0, _MOST_AXES), "size": _INDEX, "kept": Each(_INDEX)}, closed=True)
_REMEDY = "give the checkpoint that it was thinned from, and --thinnify"


def saved_recipe(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a model's recipe: nothing where it was not thinned.

    >>> saved_recipe(nn.Linear(2, 2))
    {}
    """
    recipe = recipe_of(model)
    return {} if recipe is None else {THINNING: recipe.plain()}


def thinned_as(model: nn.Module, checkpoint: Mapping[str, Any], example: Tensor, source: str) -> nn.Module:
    """The model thinned as the one in a checkpoint was: the model itself where that was not.

    Raises:
        CheckpointError: the recipe is damaged, or for another model.
        ModelError: the model cannot be captured.
    """
    recipe = recipe_in(checkpoint, source)
    return model if recipe is None else replay(trainable_graph(model, example), recipe)


def trainable_graph(model: nn.Module, example: Tensor) -> Graph:
    """A model as the graph that is thinned, on its own tensors: with dropout, and with weights for what is computed.

    >>> trainable_graph(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.zeros(2, 2)).get_submodule("1")
    Dropout(p=0.5, inplace=False)
    """
    graph = capture(model, example, share=True)
    trained = {name for name, value in graph.named_parameters() if value.requires_grad}
    settle(graph)
    for name, value in graph.named_parameters():
        value.requires_grad_(value.requires_grad or name not in trained)
    return graph


def recipe_in(checkpoint: Mapping[str, Any], source: str) -> Recipe | None:
    """The recipe in a checkpoint; None where there is none.

    Raises:
        CheckpointError: it is no recipe.
    """
    if checkpoint.get(THINNING) is not None:
        check_fields({THINNING: checkpoint[THINNING]}, Record({THINNING: Each(_ENTRY)}), source, _REMEDY)
        entries = (
            RecipeEntry(each["parameter"], each["axis"], each["size"], tuple(each["kept"]))
            for each in checkpoint[THINNING]
        )
        return _checked(Recipe(tuple(entries)), source)
    recipe, theirs = None, checkpoint.get(DISTILLERS) or []
    for each in theirs if isinstance(theirs, list) else [theirs]:
        found = _checked(Recipe(tuple(_distillers(each, source))), source)
        found = found if recipe is None else found.without_repeats(recipe)
        try:
            recipe = found if recipe is None else recipe.then(found)
        except IndexError:
            raise _damaged(source, "keeps what an earlier one has removed") from None
    return recipe


def _checked(recipe: Recipe, source: str) -> Recipe:
    """Raises CheckpointError unless the indices of each entry rise, within its size."""
    for each in recipe.entries:
        rising = all(a < b for a, b in zip(each.kept, each.kept[1:], strict=False))
        if not each.kept or not rising or (each.size is not None and each.kept[-1] >= each.size):
            raise _damaged(source, f"keeps no rising indices of {each.name!r}")
    return recipe


def _damaged(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{source} has a thinning recipe that {reason}; {_REMEDY}")


def _distillers(value: object, source: str) -> Iterator[RecipeEntry]:
    """Distiller's recipe: settings and statistics by module, and for each parameter what is kept of which axis."""
    if not isinstance(value, Inert) or value.args is None or len(value.args) != 2:
        raise _damaged(source, "is none of Distiller's")
    modules, parameters = value.args
    if not isinstance(modules, dict) or not isinstance(parameters, dict):
        raise _damaged(source, "is none of Distiller's")
    for module, settings in modules.items():
        for name, setting in settings.items() if isinstance(settings, dict) else ():
            if isinstance(setting, tuple):
                yield _entry(f"{module}.{name}", setting, source)
    for name, directives in parameters.items():
        for directive in directives if isinstance(directives, list) else ():
            yield _entry(name, directive, source)


def _entry(name: object, directive: object, source: str) -> RecipeEntry:
    """``(axis, indices)``, or ``(1, indices, shape, _)`` of a linear layer that is seen as `shape` while it is cut."""
    indices = isinstance(directive, tuple) and len(directive) in (2, 4) and isinstance(directive[1], Tensor)
    axes = isinstance(directive, tuple) and type(directive[0]) is int and directive[0] in (0, 1)
    if not isinstance(name, str) or not isinstance(directive, tuple) or not indices or not axes:
        raise _damaged(source, f"does not say what is kept of {name!r}")
    axis, kept = int(directive[0]), directive[1].reshape(-1)  # one index alone has no axis
    if kept.dtype != torch.int64 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) > _LARGEST:
        raise _damaged(source, f"keeps no indices of {name!r}")
    if len(directive) == 4:
        shape = directive[2]
        sizes: list[Any] = list(shape[2:]) if isinstance(shape, (list, tuple)) else [None]
        if axis != 1 or not all(isinstance(size, int) and 0 < size < _LARGEST for size in sizes):
            raise _damaged(source, f"does not say how {name!r} is seen")
        each = math.prod(sizes)
        if each * len(kept) > _LARGEST:
            raise _damaged(source, f"keeps too many indices of {name!r}")
        kept = (kept[:, None] * each + torch.arange(each)).flatten()
    return RecipeEntry(own_name(name), axis, None, tuple(kept.tolist()))
