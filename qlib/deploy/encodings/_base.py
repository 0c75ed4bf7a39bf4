"""What a format of encodings is given, and the registry of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qlib.quant.affine import QParams
from qlib.quant.plan import TensorPlan
from qlib.registry import Registry

__all__ = ["ENCODINGS", "Encodings", "Format", "json_text"]


@dataclass(frozen=True)
class Encodings:
    """Tensor name -> grid, in execution order: of activations, and of weights and other constants.

    `implied` names the activations that only repeat the grid of another: a tensor before a fused ReLU that of the
    ReLU's, a moved one that of its source. Some readers ask for them, others work it out.

    Laws: what stays in float is absent; a tensor that two layers put on different grids has the one with more bits,
    then the one with the wider range.
    """

    activations: Mapping[str, TensorPlan]
    parameters: Mapping[str, QParams] = field(default_factory=dict)
    implied: frozenset[str] = frozenset()

    @property
    def own(self) -> dict[str, TensorPlan]:
        """The activations without the implied ones."""
        return {name: grid for name, grid in self.activations.items() if name not in self.implied}


Format: TypeAlias = Callable[[Encodings], tuple[str, int]]
"""Encodings -> the text of the file, and how many tensors it names."""

ENCODINGS: Registry[Format] = Registry("format of encodings", "qlib.deploy.encodings")
"""Name on the command line -> file format. `ending` of a registration is how the file's name ends."""


def json_text(content: Mapping[str, Any]) -> str:
    """A file of JSON, without NaN and infinity."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
