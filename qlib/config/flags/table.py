"""The flags of the command line, as a table in the order of `--help`."""

from __future__ import annotations

from collections.abc import Mapping

from qlib.config.flags.flag import ANY, Flag, shared
from qlib.config.flags.rows import corrections, deployment, general, pruning, quantization, searches, training
from qlib.config.flags.rows.common import ALL_BUT_SUMMARY, HANDS_OVER, TRAINS

__all__ = ["FLAGS", "GROUPS"]

_PARTS = {
    general: ANY,
    training: TRAINS,
    pruning: pruning.PRUNES,
    quantization: ALL_BUT_SUMMARY,
    corrections: ALL_BUT_SUMMARY,
    searches: HANDS_OVER,
    deployment: HANDS_OVER,
}
"""A part of the table -> which verbs use its flags, where a flag does not say it."""

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    title: shared(flags, use) for part, use in _PARTS.items() for title, flags in part.GROUPS.items()
}
"""Title in `--help` -> its flags."""

FLAGS: tuple[Flag, ...] = tuple(flag for group in GROUPS.values() for flag in group)
