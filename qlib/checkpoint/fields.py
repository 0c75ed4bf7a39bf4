"""What the fields of a checkpoint may be: schemas, declared once, and the one checker of them all.

A schema is a `Value`, or is built of such: a `Record` of known keys, a dictionary of one kind of values (`Named`), a
list of one kind (`Each`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from qlib.checkpoint.fit import is_state
from qlib.checkpoint.unpickle import Inert
from qlib.errors import CheckpointError
from qlib.values import Interval, Value, real, whole

__all__ = [
    "ANY",
    "CLASSES",
    "NAME",
    "NUMBER",
    "TEXT",
    "WEIGHTS",
    "Each",
    "Named",
    "Record",
    "Schema",
    "check_fields",
    "shown",
]

_LONGEST_NAME, _LONGEST_SHOWN = 1000, 60


@dataclass(frozen=True)
class Record:
    """A dictionary that has all of `fields`; it may have more, unless it is `closed`."""

    fields: Mapping[str, Schema]
    closed: bool = False


@dataclass(frozen=True)
class Named:
    """A dictionary of names to values of one kind."""

    values: Schema


@dataclass(frozen=True)
class Each:
    """A list of values of one kind."""

    values: Schema


Schema: TypeAlias = "Value | Record | Named | Each"


def _if(accepts: bool, raw: Any) -> Any:
    if not accepts:
        raise ValueError
    return raw


def _is_name(raw: object) -> bool:
    return isinstance(raw, str) and 0 < len(raw) <= _LONGEST_NAME and raw.isprintable()


ANY = Value(lambda raw: raw, "")
NAME = Value(lambda raw: _if(_is_name(raw), raw), f"text of 1 to {_LONGEST_NAME} printable characters")
TEXT = Value(lambda raw: _if(isinstance(raw, str), raw), "text")
NUMBER = real(Interval(-3.4e38, 3.4e38))
WEIGHTS = Value(lambda raw: _if(is_state(raw), raw), "tensors by name")
CLASSES = whole(1, 10**5)


def check_fields(value: object, schema: Schema, source: str, remedy: str) -> None:
    """Holds what a checkpoint holds to a schema; the sentence goes from `source` to `remedy`.

    >>> check_fields({"steps": -1}, Record({"steps": whole(0), "epoch": whole(0)}), "checkpoint 'a'", "save it again")
    Traceback (most recent call last):
    qlib.errors.CheckpointError: checkpoint 'a' lacks epoch; save it again
    >>> check_fields({"steps": -1}, Record({"steps": whole(0)}), "checkpoint 'a'", "save it again")
    Traceback (most recent call last):
    qlib.errors.CheckpointError: checkpoint 'a' has the steps -1; allowed: a whole number from 0; save it again

    Raises:
        CheckpointError: a field is missing, unknown, of another type, or out of its range.
    """
    problem = next(_problems(value, schema, ""), None)
    if problem is not None:
        raise CheckpointError(f"{source} {problem}; {remedy}")


def _problems(value: Any, schema: Schema, place: str) -> Iterator[str]:
    """What is wrong with a value, the first thing first; `place` is its path, with a point behind it."""
    if isinstance(schema, Value):
        if not schema.accepts(value):
            yield _wrong(place, value, schema.allowed)
    elif isinstance(schema, Each):
        yield from [] if isinstance(value, (list, tuple)) else [_wrong(place, value, "a list")]
        for index, each in enumerate(value if isinstance(value, (list, tuple)) else ()):
            yield from _problems(each, schema.values, f"{place}{index}.")
    elif not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        yield _wrong(place, value, "values by name")
    elif isinstance(schema, Named):
        for name, each in value.items():
            yield from _problems(each, schema.values, f"{place}{name}.")
    else:
        missing = [f"{place}{name}" for name in schema.fields if name not in value]
        unknown = [name for name in value if schema.closed and name not in schema.fields]
        yield from [f"lacks {', '.join(missing)}"] if missing else []
        yield from [f"has an unknown field {shown(f'{place}{unknown[0]}')}"] if unknown else []
        for name, each in schema.fields.items():
            if name in value:
                yield from _problems(value[name], each, f"{place}{name}.")


def _wrong(place: str, value: object, allowed: str) -> str:
    return f"has the {place.rstrip('.') or 'content'} {shown(value)}; allowed: {allowed}"


def shown(value: object) -> str:
    """A value as a sentence shows it: short, on one line.

    >>> print(shown({}), shown(None), shown("x" * 99))
    a dict None 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
    """
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, {'x'.join(map(str, value.shape)) or 'a scalar'}"
    if isinstance(value, Inert):
        return f"an object of {value.name}"
    if not isinstance(value, (str, int, float, bool, type(None))):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
