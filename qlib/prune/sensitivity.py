"""How much a model suffers where the smallest weights, filters or channels of one parameter alone are removed.

On each batch of images, step by step, each variant runs only from the layer that it changes to the end. What is removed
is zero in the model as it is, before any batch-norm is folded: as Distiller's ``--sense`` measures it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlib.graph import Graph
from qlib.metrics import score_sums
from qlib.prune.removal import Removal, Weight, weights_of
from qlib.search.replay import Replay
from qlib.tensor_file import read_tensors, write_tensors

__all__ = ["PruningSensitivity", "PruningStudy", "sparsity_levels"]


@dataclass(frozen=True)
class PruningSensitivity:
    """The scores, in percent, and the mean loss of a model without a share `sparsity` of one parameter."""

    parameter: str
    sparsity: float
    top1: float
    top5: float
    loss: float


def sparsity_levels(start: float, stop: float, step: float) -> tuple[float, ...]:
    """The levels from `start` to below `stop`, as ``numpy.arange`` gives them to Distiller.

    >>> sparsity_levels(0.0, 0.10, 0.05), len(sparsity_levels(0.0, 0.95, 0.05))
    ((0.0, 0.05), 19)
    """
    return tuple(start + i * step for i in range(math.ceil((stop - start) / step)))


@dataclass(frozen=True)
class _Variant:
    """A weight at a level of sparsity, which shows from the step `begin` on."""

    weight: Weight
    level: float
    begin: int

    @contextlib.contextmanager
    def removed(self, removal: Removal) -> Iterator[None]:
        """The model is without it, in place."""
        parameter = self.weight.parameter.detach()
        before = parameter.clone()
        try:
            parameter.masked_fill_(~self.weight.mask(removal, self.level), 0.0)
            yield
        finally:
            parameter.copy_(before)


@dataclass(frozen=True)
class _Progress:
    """The sums of the scores of the model and its variants ``[1 + variants, 3]``, the first `done` a batch ahead.

    `samples` are the images of whole batches, `consumed` those that the data set was asked for.
    """

    sums: Tensor
    done: int = 0
    samples: int = 0
    consumed: int = 0


class PruningStudy:
    """The sensitivities of the weights of a model at some levels of sparsity.

    `graph` is that of the model, and shares its weights; what it does not read is `left_out`. Levels that remove as
    many are measured once.
    Law: a study that is kept and taken up again gives the same numbers, to the last bit.
    """

    def __init__(self, model: nn.Module, graph: Graph, removal: Removal, levels: Sequence[float]) -> None:
        self._replay, self._removal, self._levels = Replay(graph), removal, levels
        begins = [(weight, self._replay.first_use(weight.parameter)) for weight in weights_of(model, removal)]
        self.left_out = [weight.name for weight, begin in begins if begin is None]
        self.weights = [weight for weight, begin in begins if begin is not None]
        found = [
            _Variant(weight, level, begin)
            for weight, begin in begins
            for level in {weight.count(removal, each): each for each in reversed(levels)}.values()
            if begin is not None and weight.count(removal, level)
        ]
        self._variants = sorted(found, key=lambda variant: variant.begin)
        self._progress = _Progress(torch.zeros(1 + len(found), 3, dtype=torch.float64))

    def __len__(self) -> int:
        """How often each batch is run: once as the model is, then without a part."""
        return 1 + len(self._variants)

    @property
    def images_done(self) -> int:
        """The images that the data set need not be asked for again."""
        return self._progress.consumed

    @property
    def steps_done(self) -> int:
        """The number of images, one for each variant that has seen it, in the batch that is not done."""
        return self._progress.done

    @torch.inference_mode()
    def steps(self, batches: Iterable[tuple[Tensor, Tensor, int]]) -> Iterator[int]:
        """Measures on ``(images, labels, consumed)``; yields the number of images after each variant of each batch."""
        for images, labels, consumed in batches:
            state, position = self._replay.start(images), 0
            for index in range(self._progress.done, len(self)):
                variant = self._variants[index - 1] if index else None
                if variant is not None:
                    state, position = self._replay.run(state, position, variant.begin), variant.begin
                with contextlib.nullcontext() if variant is None else variant.removed(self._removal):
                    logits = self._replay.logits(self._replay.run(state, position, self._replay.end))
                sums = self._progress.sums.clone()
                sums[index] += score_sums(logits, labels)
                self._progress = replace(self._progress, sums=sums, done=index + 1)
                yield len(images)
            before = self._progress
            self._progress = _Progress(before.sums, 0, before.samples + len(images), before.consumed + consumed)

    def reference(self) -> PruningSensitivity:
        """The scores of the model as it is."""
        return self._scores("", 0.0, 0)

    def results(self) -> list[PruningSensitivity]:
        """The sensitivities of each weight, in the order of the model's parameters, at each level."""
        rows = {
            (each.weight.name, each.weight.count(self._removal, each.level)): index
            for index, each in enumerate(self._variants, 1)
        }
        return [
            self._scores(weight.name, level, rows.get((weight.name, weight.count(self._removal, level)), 0))
            for weight in self.weights
            for level in self._levels
        ]

    def _scores(self, name: str, level: float, row: int) -> PruningSensitivity:
        loss, top1, top5 = (self._progress.sums[row] / self._progress.samples).tolist()
        return PruningSensitivity(name, round(level, 9), 100 * top1, 100 * top5, loss)

    def save(self, path: Path, key: Mapping[str, Any]) -> None:
        """Writes all that `load` needs to go on from here, whole or not at all."""
        state = vars(self._progress)
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        write_tensors(path, tensors, "the sensitivities so far", {"qlib": _text(key)}, parents=True)

    def load(self, path: Path, key: Mapping[str, Any], total: int) -> bool:
        """Goes on from a file of `save`; False where it is absent, damaged, or of another study of `total` images."""
        try:
            tensors, texts = read_tensors(path, ours=True)
        except OSError:
            return False
        if texts.get("qlib") != _text(key) or tensors.keys() != vars(self._progress).keys():
            return False
        sums = tensors.pop("sums")
        if sums.shape != self._progress.sums.shape or any(value.numel() != 1 for value in tensors.values()):
            return False
        counts = {name: int(value) for name, value in tensors.items()}
        found = _Progress(sums.double(), **counts)
        if not (0 <= found.done <= len(self) and 0 <= found.samples <= found.consumed <= total):
            return False
        self._progress = found
        return True


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
