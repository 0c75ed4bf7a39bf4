"""The fingerprint of weights, by which statistics, plans and caches know the model that they are of; that of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from qlib.tensor_file import tensor_bytes

__all__ = ["content_hash", "weights_hash"]


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of names, types, shapes and values of all weights, on whatever device they are.

    >>> import torch
    >>> weights_hash({"fc.bias": torch.zeros(2)}), weights_hash({"fc.bias": torch.zeros(2, 1)})
    ('42febe43ae36e0b1', 'b8da6626c33ea05b')
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()[:16]


def content_hash(value: Any) -> str:
    """A hash of plain values and tensors: what is written and read again has the same.

    Lists and tuples count as the same, and so do the orders of keys.

    >>> content_hash({"a": (1, None), "b": True}) == content_hash({"b": True, "a": [1, None]})
    True
    >>> content_hash([1, 2]) == content_hash([1, 2.0])
    False
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}:".encode()
        yield tensor_bytes(value)
    elif isinstance(value, dict):
        yield f"{len(value)} items:".encode()
        for key in sorted(value, key=repr):
            yield f"{key!r}=".encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} values:".encode()
        for each in value:
            yield from _parts(each)
    else:
        yield f"{type(value).__name__} {value!r};".encode()
