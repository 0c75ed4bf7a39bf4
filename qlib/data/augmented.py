"""Images as training sees them: changed at random, but in the same way wherever and whenever they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qlib.data.datasets import ImageDataset

__all__ = ["AugmentedDataset", "augmented"]


@dataclass(frozen=True, eq=False)
class AugmentedDataset(ImageDataset):
    """A dataset whose transform draws from torch's random numbers.

    Law: item i depends on `seed`, `epoch` and i alone, not on the worker that reads it, the batch it is in, or what was
    read before; reading it leaves torch's own random numbers as they were.
    """

    seed: int = 0
    epoch: int = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, changed at random, and its label. Raises DataError where it cannot be decoded."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed(self.seed, self.epoch, index))
            return super().__getitem__(index)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def augmented(
    dataset: ImageDataset, transform: Callable[[Image.Image], Any], seed: int, epoch: int
) -> AugmentedDataset:
    """The images of `dataset` through a transform that draws random numbers, as an epoch sees them.

    >>> import numpy, torch
    >>> from qlib.data.datasets import ImageArray
    >>> images = ImageDataset(ImageArray("zeros", numpy.zeros((3, 2, 2), numpy.uint8)), [0, 1, 1], ["a", "b"], id)
    >>> first = augmented(images, lambda image: torch.rand(()).item(), seed=0, epoch=0)
    >>> first[0] == first[0], first[0] == first[1], first[0] == augmented(first, first.transform, 0, epoch=1)[0]
    (True, False, False)
    """
    return AugmentedDataset(dataset.images, dataset.labels, dataset.classes, transform, seed, epoch)
