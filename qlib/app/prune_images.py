"""The images that pruning looks at."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor

from qlib.app.images import calibration_batches, split_size
from qlib.app.job import Job

__all__ = ["BATCH", "IMPORTANCE", "pruning_images"]

BATCH = 64
IMPORTANCE = 256  #: images that tell what errors of outputs do to the logits


def pruning_images(job: Job, most: int | None = None) -> Iterator[Tensor]:
    """The calibration images that choice and repair look at, in batches."""
    count = min(job.config.prune.images, split_size(job, job.config.qe.calibration_split), most or sys.maxsize)
    return (images for images, _ in calibration_batches(job, count, BATCH))
