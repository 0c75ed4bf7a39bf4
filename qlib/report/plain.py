"""Frozen dataclasses as plain JSON values, back, and the JSON schema of both: three walks over the types of the fields.

A field may be text, a number, a truth, one of these or null, a tuple of one kind, a mapping of names to one kind, or
another dataclass. Numbers that JSON lacks are the texts ``inf``, ``-inf`` and ``nan``.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["from_plain", "schema", "to_plain"]

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LONGEST_SHOWN = 40
_LARGEST = 2**63 - 1


def to_plain(value: Any) -> Any:
    """The value in the types that JSON has; every field of a dataclass is there, by name.

    >>> to_plain((1, 2.5, math.inf, None, {"a": (True,)}))
    [1, 2.5, 'inf', None, {'a': [True]}]
    """
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [to_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    assert value is None or type(value) in _TYPES, f"{type(value).__name__} is not plain"
    return value


def from_plain(kind: Any, value: Any, place: str = "") -> Any:
    """The value of a type that `to_plain` made plain; a field that is absent has its default.

    >>> from_plain(tuple[float, ...], [1, "inf"])
    (1.0, inf)
    >>> from_plain(Mapping[str, int], {"a": 1.5})
    Traceback (most recent call last):
    ValueError: a is 1.5, not a whole number

    Raises:
        ValueError: the value is none of the type; the text says where and why.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (each for each in args if each is not type(None))
        return None if value is None else from_plain(kind, value, place)
    if origin is tuple:
        _require(isinstance(value, list), place, value, "a list")
        return tuple(from_plain(args[0], each, f"{place}[{index}]") for index, each in enumerate(value))
    if origin is not None:
        _require(isinstance(value, dict), place, value, "a mapping")
        return {key: from_plain(args[1], each, f"{place}.{key}".lstrip(".")) for key, each in value.items()}
    if is_dataclass(kind):
        return _record(kind, value, place)
    if kind is float and type(value) in (int, float, str):
        value = _NOT_FINITE.get(value, value) if isinstance(value, str) else _as_float(value, place)
    _require(type(value) is kind, place, value, _WORDS[kind])
    if kind is int and abs(value) > _LARGEST:
        raise ValueError(f"{place} is a number beyond all bounds")
    return value


def _as_float(value: float, place: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{place} is a number beyond all bounds") from None


def _record(kind: Any, value: Any, place: str) -> Any:
    _require(isinstance(value, dict), place, value, "a mapping")
    known = _fields(kind)
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{place or 'it'} has {_shown(unknown[0])}, which is no field of it")
    if missing := [name for name, (_, needed) in known.items() if needed and name not in value]:
        raise ValueError(f"{place or 'it'} lacks {missing[0]}")
    return kind(**{key: from_plain(known[key][0], each, f"{place}.{key}".lstrip(".")) for key, each in value.items()})


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a dataclass -> type, and whether it must be given."""
    hints = get_type_hints(kind)
    return {
        each.name: (hints[each.name], each.default is MISSING and each.default_factory is MISSING)
        for each in fields(kind)
    }


def _require(holds: bool, place: str, value: Any, words: str) -> None:
    if not holds:
        raise ValueError(f"{place or 'it'} is {_shown(value)}, not {words}")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def schema(kind: Any) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a dataclass; the first line of a docstring is the description of its type.

    >>> schema(int)
    {'$schema': 'https://json-schema.org/draft/2020-12/schema', 'type': 'integer'}
    """
    defined = {each.__name__: _object(each) for each in _dataclasses(kind)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_schema(kind),
        **({"$defs": defined} if defined else {}),
    }


def _schema(kind: Any) -> dict[str, Any]:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if each is type(None) else _schema(each) for each in args]}
    if origin is tuple:
        return {"type": "array", "items": _schema(args[0])}
    if origin is not None:
        return {"type": "object", "additionalProperties": _schema(args[1])}
    if is_dataclass(kind):
        return {"$ref": f"#/$defs/{kind.__name__}"}  # type: ignore[union-attr]
    return {"anyOf": [{"type": "number"}, {"enum": list(_NOT_FINITE)}]} if kind is float else {"type": _TYPES[kind]}


def _object(kind: Any) -> dict[str, Any]:
    known = _fields(kind)
    return {
        "description": kind.__doc__.splitlines()[0],
        "type": "object",
        "properties": {name: _schema(each) for name, (each, _) in known.items()},
        "required": [name for name, (_, needed) in known.items() if needed],
        "additionalProperties": False,
    }


def _dataclasses(kind: Any) -> Iterator[Any]:
    """The dataclasses that a type is made of, each after those that hold it; one may come twice."""
    if is_dataclass(kind):
        yield kind
        for inner, _ in _fields(kind).values():  # type: ignore[arg-type]
            yield from _dataclasses(inner)
    for inner in get_args(kind):
        if inner not in (Ellipsis, type(None)):
            yield from _dataclasses(inner)
