"""The schedule of a run."""

from __future__ import annotations

from pathlib import Path

from qlib.config.schedule.keys import EXTENSION_CLASSES
from qlib.config.schedule.read import Schedule, load_schedule
from qlib.qat.assignment import quantizer_classes
from qlib.train.lr.schedulers import LR_CLASSES

__all__ = ["CLASSES", "read_schedule"]

CLASSES = {"quantizers": quantizer_classes(), "lr_schedulers": LR_CLASSES, "extensions": EXTENSION_CLASSES}
"""What may stand in a schedule."""


def read_schedule(path: str | Path, epochs: int) -> Schedule:
    """The schedule in a file, as `load_schedule` reads it, with all classes that there are."""
    return load_schedule(path, epochs, CLASSES)
