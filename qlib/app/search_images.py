"""The calibration images that searches look at."""

from __future__ import annotations

from torch import Tensor

from qlib.app.job import Job, calibration_batches

__all__ = ["BATCH", "images_in_memory"]

BATCH = 32
"""Images that are run at once: activations of more would leave the cache."""


def images_in_memory(job: Job, count: int, fraction: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels: a `fraction` of the calibration split, but `count` at most."""
    return list(calibration_batches(job, count, BATCH, fraction))
