"""Pickles read as data: what they would call is written down, and nothing is called."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

__all__ = ["Inert", "Persistent", "Refused", "plain_key", "unpickle"]

_MAX_OPCODES = 10_000_000
_MAX_NAME, _MAX_BITS = 200, 1024

_INERT_PACKAGES = ("distiller", "torch.optim", "numpy", "argparse", "pathlib", "collections")
_INERT_NAMES = frozenset(
    [f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in
     ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")]
)  # fmt: skip


class Refused(pickle.UnpicklingError):
    """A pickle that names something that could run code; the text is that name."""


@dataclass(slots=True, eq=False)
class Inert:
    """A class, a function or an object in a pickle, which is not looked up, called or made.

    `name` is its full name; `args` what it is called with (None: it is only named), `state` what its attributes are set
    to, `items` what is put into it: values, or pairs of key and value.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Persistent:
    """What stands outside the pickle, by its identifier: a tensor's storage."""

    identifier: Any


def unpickle(stream: IO[bytes], persistent: Callable[[Any], Any] = Persistent) -> Any:
    """The next value in `stream`, which is left behind it: plain values, `Inert`, and what `persistent` returns.

    Laws: nothing else is called; plain values are None, bool, int, float, str, bytes, list, tuple and dict;
    memory is at most some hundred bytes for each byte of the pickle. A value may contain itself.

    Raises:
        Refused: it names a class or function that no checkpoint needs.
        pickle.UnpicklingError: it is truncated or damaged, or larger than any checkpoint's.

    >>> import io, os
    >>> unpickle(io.BytesIO(pickle.dumps({"epoch": 3, "betas": (0.9, 0.99)})))
    {'epoch': 3, 'betas': (0.9, 0.99)}
    >>> unpickle(io.BytesIO(pickle.dumps({1, 2}, 2)))
    Inert(name='__builtin__.set', args=([1, 2],), state=None, items=[])
    >>> unpickle(io.BytesIO(pickle.dumps(os.getcwd)))
    Traceback (most recent call last):
    qlib.checkpoint.unpickle.Refused: posix.getcwd
    """
    machine = _Machine(persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == _MAX_OPCODES:
                raise pickle.UnpicklingError(f"it has more than {_MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            _ACTIONS[opcode.name](machine, argument)
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise pickle.UnpicklingError(str(error)) from error
    raise pickle.UnpicklingError("it has no end")


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being read."""

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Takes the last value off the stack, which may not lie before the last mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            raise ValueError("a mark instead of a value")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """Takes the last mark and all that came after it off the stack."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def plain_key(key: Any) -> Any:
    """`key`, if its hash costs nothing: that of nested tuples may take for ever. Raises ValueError for others."""
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > 100 or not all(isinstance(part, (str, int, float, bytes, Inert, type(None))) for part in parts):
        raise ValueError("a key that is no plain value")
    return key


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return [(plain_key(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True)]


def _put(target: Any, values: list[Any]) -> None:
    """Appends to a list, or to an object that is inert."""
    if isinstance(target, Inert):
        target.items.extend(values)
    elif type(target) is list:
        target.extend(values)
    else:
        raise ValueError("items of what has none")


def _set(target: Any, flat: list[Any]) -> None:
    """Sets keys of a dictionary, or of an object that is inert."""
    if type(target) is dict:
        target.update(_pairs(flat))
    else:
        _put(target, _pairs(flat))


def _named(module: str, name: str) -> Inert:
    if len(module) + len(name) > _MAX_NAME:
        raise ValueError("a name that is too long")
    full = f"{module}.{name}"
    is_torch = module == "torch" or module == "torch.storage" or full in _REBUILDERS
    if is_torch or full in _INERT_NAMES or f"{module}.".startswith(tuple(f"{each}." for each in _INERT_PACKAGES)):
        return Inert(full)
    raise Refused(full)


_REBUILDERS = frozenset(
    ["torch.nn.parameter.Parameter", "_codecs.encode", "torch.nn.parameter.Buffer", "torch.serialization._get_layout"]
    + [f"torch._utils._rebuild_{what}" for what in
       ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "sparse_tensor", "qtensor",
        "meta_tensor_no_storage", "device_tensor_from_numpy", "wrapper_subclass")]
)  # fmt: skip


def _called(function: Any, args: Any) -> Inert:
    if not isinstance(function, Inert) or function.args is not None or not isinstance(args, tuple):
        raise ValueError("a call of what is no function")
    return Inert(function.name, args)  # not a copy: many calls may share their arguments


def _reduce(machine: _Machine, _: Any) -> None:
    args = machine.pop()
    machine.push(_called(machine.pop(), args))


def _new_with_keywords(machine: _Machine, _: Any) -> None:
    keywords, args = machine.pop(), machine.pop()
    machine.push(_called(machine.pop(), (args, keywords)))


def _object(machine: _Machine, _: Any) -> None:
    kind, *args = machine.pop_marked()
    machine.push(_called(kind, tuple(args)))


def _instance(machine: _Machine, argument: str) -> None:
    machine.push(_called(_named(*argument.split(" ", 1)), tuple(machine.pop_marked())))


def _number(machine: _Machine, value: int) -> None:
    if value.bit_length() > _MAX_BITS:  # it could not be printed
        raise ValueError("a number that is too long")
    machine.push(value)


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a name that is no text")
    machine.push(_named(module, name))


def _build(machine: _Machine, _: Any) -> None:
    state = machine.pop()
    if not isinstance(machine.stack[-1], Inert):
        raise ValueError("attributes of what has none")
    machine.stack[-1].state = state


def _tuple(size: int) -> Callable[[_Machine, Any], None]:
    def action(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(values)))

    return action


def _append(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    _put(machine.stack[-1], [value])


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _set(machine.stack[-1], [key, value])


def _append_marked(machine: _Machine, _: Any) -> None:
    values = machine.pop_marked()
    _put(machine.stack[-1], values)


def _set_marked(machine: _Machine, _: Any) -> None:
    values = machine.pop_marked()
    _set(machine.stack[-1], values)


def _pop(machine: _Machine, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _memoize(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _ignore(_: _Machine, __: Any) -> None:
    pass


_Action = Callable[[_Machine, Any], None]
_ACTIONS: dict[str, _Action] = {
    **dict.fromkeys(("PROTO", "FRAME"), _ignore),
    **dict.fromkeys(
        ("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
         "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        _Machine.push,
    ),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _number),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BYTEARRAY8": lambda machine, value: machine.push(bytes(value)),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(Inert("builtins.set", ())),
    "LIST": lambda machine, _: machine.push(machine.pop_marked()),
    "DICT": lambda machine, _: machine.push(dict(_pairs(machine.pop_marked()))),
    "FROZENSET": lambda machine, _: machine.push(Inert("builtins.frozenset", (machine.pop_marked(),))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_marked())),
    **{name: _tuple(size) for name, size in (("EMPTY_TUPLE", 0), ("TUPLE1", 1), ("TUPLE2", 2), ("TUPLE3", 3))},
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _append_marked),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _reduce),
    "APPEND": _append,
    "SETITEM": _set_item,
    "SETITEMS": _set_marked,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _pop,
    "POP_MARK": lambda machine, _: _ignore(machine, machine.pop_marked()),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "GLOBAL": lambda machine, full: machine.push(_named(*full.split(" ", 1))),
    "STACK_GLOBAL": _stack_global,
    "NEWOBJ_EX": _new_with_keywords,
    "OBJ": _object,
    "INST": _instance,
    "BUILD": _build,
    "PERSID": _Machine.push,
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.pop())),
}  # fmt: skip
