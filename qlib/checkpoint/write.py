"""Checkpoint files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlib.files import write_whole

__all__ = ["write_checkpoint"]


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes tensors and plain values for `read_checkpoint`.

    Raises:
        OutputError: the folder is missing or cannot be written.
    """

    def write(temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                torch.save(dict(checkpoint), file)
        except RuntimeError as error:  # torch still closes its archive when the file has failed, and fails at that
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_whole(path, write, "checkpoint")
