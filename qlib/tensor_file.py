"""Tensors by name in a `.safetensors` file, with a few texts beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qlib.files import write_whole

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    what: str,
    metadata: Mapping[str, str] | None = None,
    *,
    parents: bool = False,
) -> None:
    """Writes the file whole or not at all. Raises OutputError where it cannot be written.

    The library would write to `path` itself: with the mode of a private file, and an error of its own for a full disk.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = save(plain, None if metadata is None else dict(metadata))
    write_whole(path, lambda file: file.write_bytes(content), what, parents=parents)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the texts. Raises OSError where the file cannot be read, or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(str(error)) from error
