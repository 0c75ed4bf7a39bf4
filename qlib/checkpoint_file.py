"""Checkpoint files: read without running their code, fitted to a model, written whole or not at all.

PyTorch's zip files are read with `weights_only=True`. Those that hold other things than tensors and plain values, as
Distiller's do, are read by an unpickler of our own: it knows how to rebuild tensors, leaves an inert object where there
was one of Distiller's or of an optimizer's, and refuses all else.
"""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy
import torch
from torch import Tensor, nn

from qlib.errors import CheckpointError, OutputError

# What a damaged file makes torch and pickle raise.
_DAMAGED = (
    *(AssertionError, AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError),
    *(OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError),
)
_INERT_PACKAGES = ("distiller.", "torch.optim.")
_ZIP, _LEGACY = b"PK\x03\x04", pickle.dumps(0x1950A86A20F9469CFC6C, 2)


class _Function:
    """A function that a pickle may call, and whose attributes it cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("it changes a function")


class Inert:
    """Stands for an object of a class that is not loaded: takes any arguments and state, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Takes an item of a list that is not loaded."""

    def extend(self, _: object) -> None:
        """Takes items of a list that is not loaded."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How the second pickle protocol spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes a text as {encoding}")
    return text.encode("latin1")


@functools.cache
def _allowed() -> dict[str, Any]:
    rebuild = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    allowed: dict[str, Any] = {f"torch._utils.{name}": _Function(getattr(torch._utils, name)) for name in rebuild}
    for module in ("builtins", "__builtin__"):
        plain = (bool, complex, dict, float, frozenset, int, list, set, str, tuple)
        allowed |= {f"{module}.{kind.__name__}": kind for kind in plain}
    scalar, array = numpy.float64(0).__reduce__()[0], numpy.zeros(0).__reduce__()[0]  # their module moves
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed |= {f"{module}.scalar": _Function(scalar), f"{module}._reconstruct": _Function(cast(Any, array))}
    return allowed | {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": _Function(_encode),
        "numpy.dtype": numpy.dtype,
        "numpy.ndarray": numpy.ndarray,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.nn.parameter.Parameter": nn.Parameter,
    }


class _Unpickler(pickle.Unpickler):
    """Finds the classes of `_allowed`, makes others of Distiller's and of optimizers inert, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        allowed = _allowed()
        if full in allowed:
            return allowed[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(_INERT_PACKAGES):
            return type(name, (Inert,), {"__module__": module})
        raise _Refused(full)


class _Refused(Exception):
    """The name of a class or function that a pickle may not have."""


def _load(file: io.BytesIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = types.SimpleNamespace(__name__="qlib.checkpoint_file", Unpickler=_Unpickler, load=_load)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint file, tensors on the CPU; a file with nothing but tensors becomes its `state_dict`.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a checkpoint, or would run code when loaded.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {str(path)!r}; give the path of one that exists")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {str(path)!r} ({error.strerror}); make it readable") from error
    if not start:
        raise CheckpointError(f"checkpoint {str(path)!r} is empty; copy or save it again")
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, start)
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path) from error


def _read_pickle(path: Path, start: bytes) -> Any:
    if not start.startswith((_ZIP, _LEGACY)):
        raise CheckpointError(f"{str(path)!r} is not a checkpoint; give a file that torch.save wrote")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass
    except _DAMAGED as error:
        raise _damaged(path) from error
    try:
        # A buffer, not a file: with a file torch may try the older tar format, which unpacks onto the disk.
        content = io.BytesIO(path.read_bytes())
        return torch.load(content, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except _Refused as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was not loaded because it refers to {str(error)!r}, which could run code; "
            "save the state_dict of the model instead"
        ) from error
    except _DAMAGED as error:
        raise _damaged(path) from error


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model in a checkpoint, by the model's own names: without the `module.` of DataParallel.

    Raises:
        CheckpointError: the checkpoint has no weights.

    >>> model_state({"state_dict": {"module.fc.bias": torch.zeros(1)}, "epoch": 3})["fc.bias"]
    tensor([0.])
    """
    state = checkpoint.get("state_dict", checkpoint.get("model"))
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, checkpoint)) or "nothing"
        raise CheckpointError(f"the checkpoint has no weights under 'state_dict', only {keys}; save model.state_dict()")
    # The layers' versions, by which a model recognizes what an older one of its kind saved.
    versions = getattr(state, "_metadata", None)
    plain: collections.OrderedDict[str, Tensor] = collections.OrderedDict(
        (_own_name(name), value) for name, value in state.items()
    )
    if versions is not None:
        cast(Any, plain)._metadata = {_own_name(f"{name}.").rstrip("."): value for name, value in versions.items()}
    return plain


def _own_name(name: str) -> str:
    """The name without `module.`, also behind `features.` (an alexnet or vgg of which only that part was parallel)."""
    return re.sub(r"^(features\.)?module\.", r"\1", name)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    remedy: str = "give the -a that it was made with, and data with as many classes",
) -> None:
    """Loads `state` into `model`; all names and shapes must agree. The error's sentence goes from `source` to `remedy`.

    What only training needs may differ: auxiliary heads, and the counter that batch-norm has had since torch 0.4.1.

    Raises:
        CheckpointError: parameters are missing, too many, or of other shapes.
    """
    wanted = model.state_dict()
    given = _without_auxiliary_heads(_with_modern_names(state), wanted)
    misfits = [
        f"{name} is {_shape(value)} in it and {_shape(wanted[name])} in the model"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if misfits:
        raise _unfit(source, [_some("of another shape", misfits)], remedy)
    versions = getattr(state, "_metadata", None) or {"": {"version": getattr(model, "_version", None)}}
    cast(Any, given)._metadata = versions
    result = model.load_state_dict(given, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    problems = [("missing", missing), ("unexpected", result.unexpected_keys)]
    if any(names for _, names in problems):
        raise _unfit(source, [_some(what, names) for what, names in problems if names], remedy)


def _unfit(source: str, problems: list[str], remedy: str) -> CheckpointError:
    return CheckpointError(f"{source} does not fit the model: {', '.join(problems)}; {remedy}")


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _with_modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names that torchvision's densenets have now; their published weights have older ones."""
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    return collections.OrderedDict((old.sub(r"\1\2.", name), value) for name, value in state.items())


def _without_auxiliary_heads(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the auxiliary heads of googlenet and inception_v3, if the model has none."""
    heads = ("aux1.", "aux2.", "AuxLogits.")
    absent = tuple(head for head in heads if not any(name.startswith(head) for name in wanted))
    return collections.OrderedDict((name, value) for name, value in state.items() if not name.startswith(absent))


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes tensors and plain values for `read_checkpoint`; the file appears whole or not at all.

    Raises:
        OutputError: the folder is missing or cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            torch.save(dict(checkpoint), file)
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write checkpoint {str(path)!r} ({error.strerror or error}); give a folder that can be written"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
