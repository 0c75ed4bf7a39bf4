"""Checkpoint files, read as data, so that nothing in them can run.

One reader serves PyTorch's zip files, the format of PyTorch before 1.6 and the objects of Distiller's in either: the
pickle in them is read by `unpickle`, which calls nothing, and `with_tensors` makes the tensors. `torch.load` would not
do, even with `weights_only=True`: it takes compressed entries of any size, and calls `bytearray` and `torch.Tensor`
with any number.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from qlib.checkpoint.tensors import Unsupported, storage_of, with_tensors
from qlib.checkpoint.unpickle import Persistent, Refused, unpickle
from qlib.errors import CheckpointError
from qlib.tensor_file import read_tensors

__all__ = ["read_checkpoint"]

_ZIP, _LEGACY = b"PK\x03\x04", pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_BYTES_OF_COUNT = 8
_OF_ZIPFILE = (EOFError, MemoryError, RuntimeError, ValueError, OverflowError, struct.error)  # of damaged archives


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint file, tensors on the CPU; a file with nothing but tensors becomes its `state_dict`.

    Objects of classes other than tensors and plain values are `Inert`.

    Raises:
        CheckpointError: the file is missing, empty, truncated, no checkpoint, or names something that could run code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {str(path)!r}; give the path of one that exists")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
        if not start:
            raise CheckpointError(f"checkpoint {str(path)!r} is empty; copy or save it again")
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, start)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {str(path)!r} ({error.strerror}); make it readable") from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise CheckpointError(
            f"{str(path)!r} holds {type(checkpoint).__name__!r} and no tensors by name, so it is not a checkpoint; "
            "save the state_dict of the model"
        )
    if all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint}
    return dict(checkpoint)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {str(path)!r} is truncated or damaged; copy or save it again")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path) from error


def _read_torch(path: Path, start: bytes) -> Any:
    try:
        if start.startswith(_ZIP):
            return _read_zip(path)
        if start.startswith(_LEGACY):
            return _read_legacy(io.BytesIO(path.read_bytes()))
    except Refused as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was not loaded because it refers to {str(error)!r}, which could run code; "
            "save the state_dict of the model instead"
        ) from error
    except Unsupported as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} holds a {error} tensor, which no weights are; save model.state_dict() of the"
            " float model, dense and with values"
        ) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_OF_ZIPFILE) as error:
        raise _damaged(path) from error
    raise CheckpointError(f"{str(path)!r} is not a checkpoint; give a file that torch.save wrote")


def _read_zip(path: Path) -> Any:
    """A file of PyTorch 1.6 and later: ``NAME/data.pkl``, and each storage as ``NAME/data/KEY``, none compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        sizes = [info.file_size for info in entries.values()]
        compressed = any(info.compress_type != zipfile.ZIP_STORED for info in entries.values())
        if compressed or len(sizes) < len(archive.infolist()) or sum(sizes) > path.stat().st_size:
            raise zipfile.BadZipFile("compressed or overlapping entries, which torch does not write")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile("no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")

        def content(name: str) -> bytearray:
            if folder + name not in entries:
                raise zipfile.BadZipFile(f"no {name}")
            return bytearray(archive.read(folder + name))

        if f"{folder}byteorder" in entries and content("byteorder").decode("ascii", "replace") != sys.byteorder:
            raise zipfile.BadZipFile("numbers in the other byte order")
        return with_tensors(unpickle(io.BytesIO(content("data.pkl"))), lambda key, _: content(f"data/{key}"))


def _read_legacy(stream: io.BytesIO) -> Any:
    """A file of PyTorch before 1.6: pickles of a number, the version, the machine, the value and the keys of storages.

    Then, for each key, the number of its values, eight bytes, and the values.
    """
    _, version, machine = (unpickle(stream) for _ in range(3))
    little = machine.get("little_endian", True) if isinstance(machine, dict) else None
    if version != 1001 or little is not (sys.byteorder == "little"):
        raise pickle.UnpicklingError("another version of the format, or numbers in the other byte order")
    sizes: dict[str, int] = {}

    def persistent(identifier: Any) -> Persistent:
        key, _, size = storage_of(identifier)
        sizes[key] = size
        return Persistent(identifier)

    value = unpickle(stream, persistent)
    keys, contents = unpickle(stream), dict[str, bytearray]()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in sizes or len(stream.read(_BYTES_OF_COUNT)) < _BYTES_OF_COUNT:
            raise pickle.UnpicklingError("a storage that no tensor has, or that is not there")
        contents[key] = bytearray(stream.read(sizes[key]))
    return with_tensors(value, lambda key, _: contents.get(key, bytearray()))
