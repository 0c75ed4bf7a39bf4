"""What `unpickle` gives, with tensors in the place of the calls that would rebuild them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from qlib.checkpoint.unpickle import Inert, Persistent, plain_key

__all__ = ["Storages", "Unsupported", "storage_of", "with_tensors"]

_MAX_DEPTH, _MAX_DIMENSIONS, _MAX_VALUES = 100, 64, 2**59

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,  # of any type: what its identifier counts is not known
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

_QUANTIZED_STORAGES = {"QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"}

_TYPES_WITHOUT_STORAGES = {torch.uint16, torch.uint32, torch.uint64, torch.complex32} | {
    dtype for name, dtype in vars(torch).items() if name.startswith("float8_")
}

_KINDS_WITHOUT_WEIGHTS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
}
"""What torch rebuilds such tensors with -> what they are called."""


class Unsupported(pickle.UnpicklingError):
    """A tensor of a kind that no weights have; the text is that kind."""


Storages = Callable[[str, int], bytearray]
"""The bytes of the storage with a key; the number is how many there should be."""


def with_tensors(value: Any, storages: Storages) -> Any:
    """`value` as `unpickle` gave it, with its tensors (on the CPU), dtypes, sizes and ordered dictionaries made.

    Objects of other classes stay the `Inert` that they are; what they hold is made in the same way, and set in them.
    `storages` is asked once for each storage.

    Raises:
        pickle.UnpicklingError: a call has other arguments than torch writes, a tensor lies outside its storage, or the
            value contains itself.
        Unsupported: a tensor is of a kind that no weights have: sparse, quantized, or without values (meta).

    >>> size = Inert("torch.Size", ((2, 3),))
    >>> with_tensors({"size": size, "dtype": Inert("torch.float16")}, lambda key, count: bytearray(count))
    {'size': (2, 3), 'dtype': torch.float16}
    """
    return _Builder(storages).built(value, 0)


def storage_of(identifier: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and number of bytes of the storage that an identifier names (those of an untyped one: at least).

    Raises UnpicklingError for an identifier of something else, Unsupported for a storage of quantized values.
    """
    match identifier:
        case ("storage", Inert(name=name, args=None), str(key), str(), int(count), *_):
            kind = name.rpartition(".")[2]
            if kind in _STORAGE_TYPES and 0 <= count <= _MAX_VALUES:
                return key, _STORAGE_TYPES[kind], count * _STORAGE_TYPES[kind].itemsize
            if kind in _QUANTIZED_STORAGES:
                raise Unsupported("quantized")
            raise pickle.UnpicklingError(f"a storage of {count} values of {name}")
    raise pickle.UnpicklingError("an identifier of no storage")


class _Builder:
    """Builds each object once, however often it is referred to."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._opened: dict[str, Tensor] = {}
        self._bools: dict[str, Tensor] = {}
        self._built: dict[int, Any] = {}

    def built(self, value: Any, depth: int) -> Any:
        """The value with everything in it that can be made."""
        if not isinstance(value, (list, tuple, dict, Inert, Persistent)):
            return value
        if id(value) not in self._built:
            if depth == _MAX_DEPTH:
                raise pickle.UnpicklingError(f"it is nested more than {_MAX_DEPTH} deep, or contains itself")
            self._built[id(value)] = self._new(value, depth + 1)
        return self._built[id(value)]

    def _new(self, value: Any, depth: int) -> Any:
        if isinstance(value, Persistent):
            return self._storage(value.identifier)
        if isinstance(value, dict):
            return {key: self.built(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.built(item, depth) for item in value)
        if value.args is not None and value.name in _KINDS_WITHOUT_WEIGHTS:
            raise Unsupported(_KINDS_WITHOUT_WEIGHTS[value.name])
        args = self.built(value.args, depth)  # one tuple, however many calls share it
        items = [self.built(item, depth) for item in value.items]
        state = self.built(value.state, depth)
        if args is None:
            dtype = vars(torch).get(value.name.removeprefix("torch."))  # getattr would import modules
            return dtype if isinstance(dtype, torch.dtype) else value
        if value.name in _CALLS:
            try:
                return _CALLS[value.name](args, items, state)
            except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
                raise pickle.UnpicklingError(f"{value.name} with other arguments than torch writes") from error
        if value.name.startswith("torch._utils."):
            raise pickle.UnpicklingError(f"a tensor of a kind that weights do not have ({value.name})")
        value.args, value.items, value.state = args, items, state
        return value

    def _storage(self, identifier: Any) -> Tensor:
        key, dtype, size = storage_of(identifier)
        if key not in self._opened:
            found = self._storages(key, size)
            self._opened[key] = torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0).byte()
        content = self._opened[key]
        if len(content) < size:
            raise pickle.UnpicklingError(f"storage {key} has {len(content)} bytes, not {size}")
        if dtype == torch.bool and key not in self._bools:
            self._bools[key] = content != 0
        if dtype == torch.bool:
            return self._bools[key][:size]
        return content if dtype == torch.uint8 else content[:size].view(dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> Tensor:
    """The part of a storage that a tensor is, if it lies inside and holds no value twice.

    Of `more`, whether a gradient is wanted and hooks do not matter; torch adds marks for values to be conjugated.
    """
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or any(more[2:]):
        raise ValueError("a tensor that is no plain one")
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise ValueError("sizes and strides that are no numbers")
    count = prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and (last >= storage.numel() or count > storage.numel()):
        raise ValueError("a tensor outside its storage")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _typed_tensor(args: tuple[Any, ...], *_: Any) -> Tensor:
    storage, offset, size, stride, gradient, hooks, dtype, *more = args
    if not isinstance(dtype, torch.dtype) or dtype not in _TYPES_WITHOUT_STORAGES or storage.dtype != torch.uint8:
        raise ValueError("a type that has its own storages, or no weights")
    width = dtype.itemsize
    return _tensor(storage[: len(storage) // width * width].view(dtype), offset, size, stride, gradient, hooks, *more)


def _parameter(args: tuple[Any, ...], *_: Any) -> Tensor:
    if not isinstance(args[0], Tensor):
        raise TypeError("a parameter that is no tensor")
    return args[0]


def _size(args: tuple[Any, ...], *_: Any) -> tuple[Any, ...]:
    if not isinstance(args[0], tuple):
        raise TypeError("a size that is no tuple")
    return args[0]


def _ordered(args: tuple[Any, ...], items: list[Any], state: Any) -> OrderedDict[Any, Any]:
    old: list[Any] = args[0] if args else []  # by Python 2, which writes a new list of pairs for each
    made: OrderedDict[Any, Any] = OrderedDict((plain_key(key), value) for key, value in [*old, *items])
    old.clear()  # calls that share a list could else take any memory
    versions = state.get("_metadata") if isinstance(state, Mapping) else None
    if isinstance(versions, Mapping):
        made._metadata = versions  # type: ignore[attr-defined]  # where torch keeps the versions of layers
    return made


_CALLS: dict[str, Callable[[tuple[Any, ...], list[Any], Any], Any]] = {
    "torch._utils._rebuild_tensor": lambda args, *_: _tensor(*args),
    "torch._utils._rebuild_tensor_v2": lambda args, *_: _tensor(*args),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
}
