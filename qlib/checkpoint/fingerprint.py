"""The fingerprint of weights, by which statistics, plans and caches know the model that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["weights_hash"]


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of names, types, shapes and values of all weights, on whatever device they are.

    >>> weights_hash({"fc.bias": torch.zeros(2)}), weights_hash({"fc.bias": torch.zeros(2, 1)})
    ('42febe43ae36e0b1', 'b8da6626c33ea05b')
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().view(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes() if len(plain) else b"")
    return digest.hexdigest()[:16]
