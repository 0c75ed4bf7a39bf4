"""The calibration images that searches look at."""

from __future__ import annotations

from torch import Tensor

from qlib.data import choose_subset
from qlib.job import LAYOUT, Job, loader_of, open_split, report_skipped

__all__ = ["BATCH", "calibration_batches"]

BATCH = 32
"""Images that are run at once: activations of more would leave the cache."""


def calibration_batches(job: Job, count: int, fraction: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the calibration split in its fixed random order: a `fraction`, but `count` at most."""
    dataset = open_split(job, job.config.qe.calibration_split)
    indices = choose_subset(len(dataset), fraction, job.config.seed, shuffled=True)[:count]
    loader = loader_of(job, dataset, indices, BATCH)
    batches = [(x.to(job.device, memory_format=LAYOUT), labels.to(job.device)) for x, labels in loader]
    report_skipped(loader)
    return batches
