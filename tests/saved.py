"""What checkpoints hold, and whether two of them hold the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def contents(path: Path) -> dict[str, Any]:
    """The dictionary of a checkpoint, as torch's own loader reads it."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, tensors by their bytes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        bytes_of = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bytes_of)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)
