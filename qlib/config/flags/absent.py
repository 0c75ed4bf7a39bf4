"""Flags and values of Distiller's command line that this program does not have, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

__all__ = ["ABSENT", "why_absent"]

_GREEDY = "is not there: --prune chooses what goes over all layers at once, and a schedule prunes while it trains"
_EXITS = "is not there yet, as early exits are not; train the same model without them"
_BUDGET = "is not there, nor is reinforcement learning: --qe-budget chooses the bits of each layer under a budget"

ABSENT: Mapping[str, str] = {
    "--greedy*": _GREEDY,
    "--early*": _EXITS,
    "--amc*": _BUDGET,
    "--netadapt*": _BUDGET,
}
"""A flag, a flag with its value, or how flags begin (``*``) -> the rest of the sentence."""


def why_absent(words: str) -> str | None:
    """Why a flag, or a flag with its value, is not there and what to do instead; None for others.

    >>> print(why_absent("--greedy-ft-epochs"))
    is not there: --prune chooses what goes over all layers at once, and a schedule prunes while it trains
    >>> why_absent("--sense quant")
    """
    return next((why for pattern, why in ABSENT.items() if fnmatchcase(words, pattern)), None)
