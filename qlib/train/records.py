"""What a run of training writes of each epoch: a row of `training.csv`, and events where TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlib.files import append_csv

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Writes the metrics of each epoch into the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "training.csv"
        self._board = _board(folder)

    def add(self, epoch: int, training: Mapping[str, float], validation: Mapping[str, float], seconds: float) -> None:
        """Adds an epoch; `seconds` are those of its training. Raises OutputError where the file cannot be written."""
        means = {f"train {name}": value for name, value in training.items()}
        results = {f"valid {name}": value for name, value in validation.items()}
        append_csv(self._file, {"epoch": epoch, **means, **results, "seconds": round(seconds, 1)})
        if self._board is None:
            return
        for phase, values in (("Training", training), ("Validation", validation)):
            for name, value in values.items():
                self._board.add_scalar(f"Performance/{phase}/{name.capitalize()}", value, epoch)
        self._board.flush()


def _board(folder: Path) -> Any:
    """TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
