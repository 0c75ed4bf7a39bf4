"""The flags of the command line, as a table in the order of `--help`."""

from __future__ import annotations

from collections.abc import Mapping

from qlib.config.flags.flag import Flag
from qlib.config.flags.rows import corrections, deployment, general, quantization, searches, training

__all__ = ["FLAGS", "GROUPS"]

_PARTS = (general, training, quantization, corrections, searches, deployment)

GROUPS: Mapping[str, tuple[Flag, ...]] = {title: flags for part in _PARTS for title, flags in part.GROUPS.items()}
"""Title in `--help` -> its flags."""

FLAGS: tuple[Flag, ...] = tuple(flag for group in GROUPS.values() for flag in group)
