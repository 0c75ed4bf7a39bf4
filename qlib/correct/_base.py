"""What a correction is, the registry of all of them, and the images that they look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from qlib.quant.plan import Plan
from qlib.registry import Registry

__all__ = ["CORRECTIONS", "CalibrationImages", "Correction", "call"]

Correction: TypeAlias = Callable[..., Plan | list[str]]
"""Changes the weights and biases of a folded graph in place; returns the new plan where it changes that, else lines to
log. It takes what it needs, by name, of: `graph`; `plan`; `norms` (batch-norm statistics by layer, which it changes
along); `images`; `reference` (the graph as it was before the first correction of the plan); `iterations`; and its
number, if it registers one.
"""

CORRECTIONS: Registry[Correction] = Registry("correction", "qlib.correct")
"""The facts of a registration are the fields of `config.flags.corrections.CorrectionFlag`."""


def call(correction: Correction, offered: Mapping[str, object]) -> Plan | list[str]:
    """What a correction returns, given those of the offered arguments that its signature names.

    >>> call(lambda graph: [f"corrected {graph}"], {"graph": "a graph", "plan": "a plan"})
    ['corrected a graph']
    """
    names = inspect.signature(correction).parameters
    return correction(**{name: value for name, value in offered.items() if name in names})


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
