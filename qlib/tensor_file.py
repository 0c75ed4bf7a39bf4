"""Tensors by name in a `.safetensors` file, with a few texts beside them.

The format has no checksum, so that ours stands among the texts: a file of ours that was damaged or changed is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from qlib.files import write_whole

__all__ = ["FLUSHED_BELOW", "flushed", "read_tensors", "tensor_bytes", "write_tensors"]

FLUSHED_BELOW = 1e-30
"""Weights of less magnitude are written as 0."""

_HASH = "qlib_hash"
_BYTES_OF_LENGTH, _ALIGNMENT = 8, 8


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    what: str,
    metadata: Mapping[str, str] | None = None,
    *,
    parents: bool = False,
) -> None:
    """Writes the file whole or not at all, the same bytes for the same content. Raises OutputError where it cannot.

    The library would write to `path` itself: with the mode of a private file, and an error of its own for a full disk.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    texts = dict(metadata or {})
    content = _in_order(save(plain, {**texts, _HASH: _hash(plain, texts)}))
    write_whole(path, lambda file: file.write_bytes(content), what, parents=parents)


def read_tensors(path: Path, *, ours: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the texts; a file that is `ours` has a hash, one of others may have none.

    Raises OSError where the file cannot be read, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(str(error)) from error
    found = texts.pop(_HASH, None)
    if found != _hash(tensors, texts) and (found is not None or ours):
        raise OSError("it does not hold what was written")
    return tensors, texts


def flushed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model as it is written: with 0 for what training has driven to almost 0.

    Products with such a weight are denormal numbers, with which a CPU computes many times slower; to the sum that they
    are part of they add nothing. A tensor without any is the same tensor.

    >>> import torch
    >>> flushed({"weight": torch.tensor([1e-31, -1e-29, -3e-39])})
    {'weight': tensor([ 0.0000e+00, -1.0000e-29,  0.0000e+00])}
    """
    return {name: _flushed(value) for name, value in state.items()}


def _flushed(value: Tensor) -> Tensor:
    tiny = (value.abs() < FLUSHED_BELOW) & (value != 0) if value.is_floating_point() else value.new_zeros(1)
    return value.masked_fill(tiny, 0.0) if bool(tiny.any()) else value


def tensor_bytes(value: Tensor) -> bytes:
    """The values of a tensor, row by row."""
    plain = value.detach().cpu().contiguous().view(-1)
    return plain.view(uint8).numpy().tobytes() if len(plain) else b""


def _hash(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name!r} {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def _in_order(content: bytes) -> bytes:
    """The file with its texts in order: the library writes them in any."""
    start = _BYTES_OF_LENGTH + int.from_bytes(content[:_BYTES_OF_LENGTH], "little")
    header = json.loads(content[_BYTES_OF_LENGTH:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_BYTES_OF_LENGTH, "little") + text + content[start:]
