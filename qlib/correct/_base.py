"""What the corrections share: the images they look at, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CalibrationImages"]


@dataclass(frozen=True)
class CalibrationImages:
    """The first `count` calibration images, in the run's fixed random order.

    `batches()` reads them in batches of `BATCH` on `device`. `folder` takes what is kept on disk meanwhile; `seed`
    fixes all that is random.
    """

    batches: Callable[[], Iterator[Tensor]]
    count: int
    device: torch.device
    folder: Path
    seed: int = 0


BATCH = 32
"""Images of a calibration batch."""
