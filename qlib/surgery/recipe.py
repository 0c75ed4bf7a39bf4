"""The recipe of a thinned model: what was kept along each axis of each tensor, as plain data for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlib.errors import CheckpointError
from qlib.graph.coordinates import ChannelClasses
from qlib.graph.ir import Graph

__all__ = ["Recipe", "RecipeEntry"]


@dataclass(frozen=True)
class RecipeEntry:
    """The indices that stay along an axis of a tensor which had `size` of them, None where nobody knows."""

    name: str
    axis: int
    size: int | None
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """What was kept along each axis that became shorter.

    Law: of a fresh graph of the same model it makes one of the same names and shapes.

    >>> Recipe((RecipeEntry("conv.weight", 0, 3, (0, 2)),)).plain()
    [{'parameter': 'conv.weight', 'axis': 0, 'size': 3, 'kept': [0, 2]}]
    """

    entries: tuple[RecipeEntry, ...]

    @classmethod
    def of(cls, classes: ChannelClasses, keep: Tensor) -> Recipe:
        """That of a graph with these classes, of which some stay."""
        found = ((each, keep[each.classes].nonzero().flatten().tolist()) for each in classes.axes)
        return cls(
            tuple(
                RecipeEntry(each.name, each.axis, len(each.classes), tuple(kept))
                for each, kept in found
                if len(kept) < len(each.classes)
            )
        )

    def then(self, other: Recipe) -> Recipe:
        """That of thinning by both, one after the other.

        >>> first = Recipe((RecipeEntry("w", 0, 4, (0, 2, 3)),))
        >>> first.then(Recipe((RecipeEntry("w", 0, 3, (1, 2)),))).entries
        (RecipeEntry(name='w', axis=0, size=4, kept=(2, 3)),)
        """
        found = {(each.name, each.axis): each for each in self.entries}
        for entry in other.entries:
            before = found.get((entry.name, entry.axis))
            if before is not None:
                entry = RecipeEntry(entry.name, entry.axis, before.size, tuple(before.kept[i] for i in entry.kept))
            found[entry.name, entry.axis] = entry
        return Recipe(tuple(found.values()))

    def without_repeats(self, before: Recipe) -> Recipe:
        """Without the entries that an earlier recipe has left as many indices of: Distiller repeats such."""
        lengths = {(each.name, each.axis): len(each.kept) for each in before.entries}
        return Recipe(tuple(e for e in self.entries if lengths.get((e.name, e.axis)) != len(e.kept)))

    def since(self, before: Recipe | None) -> Recipe:
        """That of the second one of two thinnings, which this is of both, and `before` of the first.

        >>> first, both = (Recipe((RecipeEntry("w", 0, 4, kept),)) for kept in ((0, 2, 3), (2, 3)))
        >>> both.since(first).entries
        (RecipeEntry(name='w', axis=0, size=3, kept=(1, 2)),)
        """
        earlier = {(each.name, each.axis): each.kept for each in (before.entries if before is not None else ())}
        found = list[RecipeEntry]()
        for each in self.entries:
            kept = earlier.get((each.name, each.axis))
            if kept is None:
                found.append(each)
            elif len(each.kept) < len(kept):
                places = {index: place for place, index in enumerate(kept)}
                found.append(RecipeEntry(each.name, each.axis, len(kept), tuple(places[i] for i in each.kept)))
        return Recipe(tuple(found))

    def of_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of tensors by the names of parameters: masks, gradients, moments of an optimizer.

        >>> Recipe((RecipeEntry("w", 0, 3, (0, 2)),)).of_tensors({"w": torch.tensor([1, 2, 3]), "v": torch.ones(1)})
        {'w': tensor([1, 3]), 'v': tensor([1.])}
        """
        found = dict(tensors)
        for each in self.entries:
            if each.name in found:
                places = torch.tensor(each.kept, device=found[each.name].device)
                found[each.name] = found[each.name].index_select(each.axis, places)
        return found

    def removed(self, graph: Graph, classes: ChannelClasses) -> list[int]:
        """The classes of a graph that the recipe removes. Raises CheckpointError where they are not those of it."""
        tensors = {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers())}
        removed = torch.zeros(classes.count + 1, dtype=torch.bool)
        for each in self.entries:
            found, tensor = classes.of(each.name, each.axis), tensors.get(each.name)
            if tensor is None:
                raise _for_another(f"{each.name!r} is no tensor of the model")
            size = tensor.shape[each.axis] if tensor.ndim > each.axis else 0
            if size <= each.kept[-1] or each.size not in (None, size):
                already = "; it is thinned already" if size == len(each.kept) else ""
                made = each.size or f"more than {each.kept[-1]}"
                raise _for_another(f"{each.name!r} has {size} indices on axis {each.axis}, of {made}{already}")
            gone = torch.ones(size, dtype=torch.bool)
            gone[list(each.kept)] = False
            if found is None or bool((found[gone] == 0).any()):
                raise _for_another(f"axis {each.axis} of {each.name!r} is one that always stays")
            removed[found[gone]] = True
        return removed[1:].nonzero().flatten().add(1).tolist()

    def check(self, small: Recipe | None) -> None:
        """Raises CheckpointError unless thinning has kept what the recipe says, and nothing less."""
        made = {(each.name, each.axis): each.kept for each in small.entries} if small is not None else {}
        wrong = next((each.name for each in self.entries if made.get((each.name, each.axis)) != each.kept), None)
        if wrong is not None:
            raise _for_another(f"what it keeps of {wrong!r} is tied to what it removes elsewhere")

    def plain(self) -> list[dict[str, Any]]:
        """As plain data."""
        return [{"parameter": e.name, "axis": e.axis, "size": e.size, "kept": list(e.kept)} for e in self.entries]


def _for_another(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the thinning recipe is for another model: {reason}; give the -a that the checkpoint was made with"
    )
