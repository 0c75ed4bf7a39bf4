"""YAML as a tree that remembers where everything stood; nothing in a file can run code, or grow without end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from qlib.errors import ConfigError

__all__ = ["MOST_SETTINGS", "Node", "Scalar", "load_yaml", "parse_yaml"]

Scalar: TypeAlias = "bool | int | float | str | None"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"

_MAX_DEPTH = 50
_MAX_BYTES = 16 * 2**20
_MAX_VALUES = 1_000_000
_MAX_INTEGER = 2**63 - 1

MOST_SETTINGS = 50_000
"""Values of a file that people write: ten for each layer of the largest networks. Of others there may be a million."""

_SURPRISES = re.compile(r"[-+]?(\d[\d_]*:[\d_:.]+|0[\d_]+)")
"""Numbers that YAML 1.1 reads otherwise than people do: 1:30 is 90, and 010 is 8."""

_NO_LINES: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a YAML file, with its place.

    `value` is a scalar, a tuple of nodes (a list) or a dict of nodes in the file's order (a mapping). Keys are the
    text that stands in the file, whatever YAML takes it for: a layer may be called `0` or `on`.
    """

    file: str
    line: int
    value: Scalar | tuple[Node, ...] | Mapping[str, Node]
    key_lines: Mapping[str, int] = field(default_factory=lambda: _NO_LINES)

    @property
    def where(self) -> str:
        """`file:line` of the value."""
        return f"{self.file}:{self.line}"

    def where_key(self, key: str) -> str:
        """`file:line` of a key of a mapping."""
        return f"{self.file}:{self.key_lines[key]}"

    @property
    def mapping(self) -> Mapping[str, Node] | None:
        """The entries if this is a mapping, else None."""
        return self.value if isinstance(self.value, dict) else None

    def __str__(self) -> str:
        """The value as an error message shows it.

        >>> print(Node("a.yaml", 1, "sym"), Node("a.yaml", 1, True), Node("a.yaml", 1, 1), Node("a.yaml", 1, ()))
        'sym' true 1 a list
        """
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, tuple):
            return "a list"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return "null" if self.value is None else repr(self.value)


def load_yaml(path: str | Path, most: int = _MAX_VALUES, doubled: list[str] | None = None) -> Node:
    """The tree of a file with one YAML document, which has `most` values at most.

    Duplicate keys are no error where there is a list `doubled` for sentences of them, as `file:line: sentence`: then
    the last of them counts.

    Raises:
        ConfigError: the file cannot be read, has more than 16 MiB, or for what `parse_yaml` says.
    """
    return parse_yaml(_read(str(path)), str(path), most, doubled)


def parse_yaml(text: str, file: str, most: int = _MAX_VALUES, doubled: list[str] | None = None) -> Node:
    """The tree of one YAML document; `file` is what error messages call it.

    >>> parse_yaml("bits: 4", "a.yaml").mapping["bits"]
    Node(file='a.yaml', line=1, value=4, key_lines={})

    Raises:
        ConfigError: the text is empty or is not YAML; it is nested more than 50 deep, or has more than `most`
            values, an alias counted as what it stands for; or it has tabs in its indentation, duplicate keys, tags such
            as `!!python/object`, or numbers that YAML reads otherwise than people do: all of those, each with
            `file:line`.
    """
    tabs = [n for n, line in enumerate(text.split("\n"), 1) if "\t" in line[: len(line) - len(line.lstrip(" \t"))]]
    if tabs:
        raise ConfigError([f"{file}:{n}: a tab in the indentation; YAML allows only spaces" for n in tabs])
    reader = _Reader(file, most, doubled)
    try:
        node = reader.document(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(file, text, error)) from None
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no file in UTF-8 can hold
        line = text.count("\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {text[error.start]!r} is no character") from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return node


def _read(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_BYTES:
        size = os.path.getsize(file) / 2**20
        raise ConfigError(f"{file}: has {size:.0f} MiB, and a YAML file may have {_MAX_BYTES >> 20}; give another file")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8") from None


def _syntax_problem(file: str, text: str, error: Any) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = f" ({error.context})" if error.context else ""
        return f"{file}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}{context}"
    line = text.count("\n", 0, getattr(error, "position", 0)) + 1
    return f"{file}:{line}: not valid YAML: {getattr(error, 'reason', error)}"


@dataclass
class _Anchored:
    """What an anchor stands for: its node (None while it is read), how many values it holds and how deep they lie."""

    line: int
    node: Node | None = None
    values: int = 0
    height: int = 0


class _Reader:
    """Turns the events of a parser into `Node`s, and collects the problems on the way.

    `_depth` is that of the value at hand, `_deepest` that of the deepest one since the last anchor, and `_values`
    counts the values. Both count an alias as what it stands for: whoever walks the tree later is safe.
    """

    def __init__(self, file: str, most: int, doubled: list[str] | None) -> None:
        self.file, self._most, self._doubled = file, most, doubled
        self.problems: list[str] = []
        self._anchors: dict[str, _Anchored] = {}
        self._depth = self._deepest = self._values = 0
        self._resolver: Any = yaml.resolver.Resolver()
        self._constructor: Any = yaml.constructor.SafeConstructor()

    def document(self, events: Iterator[Any]) -> Node:
        """The tree of the only document."""
        self._events = events
        next(events)
        start = next(events)
        if isinstance(start, yaml.StreamEndEvent):
            raise ConfigError(f"{self.file}:1: the file is empty")
        node = self._node(next(events))
        next(events)
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            raise _misplaced(after, "but found another document (expected a single document in the stream)")
        return node

    def _node(self, event: Any) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.anchor is None:
            return self._value(event)
        if event.anchor in self._anchors:
            raise _misplaced(event, f"found duplicate anchor {event.anchor!r}")
        anchored = self._anchors[event.anchor] = _Anchored(_line(event))
        before, deepest, self._deepest = self._values, self._deepest, self._depth
        anchored.node = self._value(event)
        anchored.values, anchored.height = self._values - before, self._deepest - self._depth
        self._deepest = max(deepest, self._deepest)
        return anchored.node

    def _alias(self, event: Any) -> Node:
        if event.anchor not in self._anchors:
            raise _misplaced(event, f"found undefined alias {event.anchor!r}")
        anchored = self._anchors[event.anchor]
        self._count(event, anchored.values, anchored.height)
        if anchored.node is None:
            self.problems.append(f"{self.file}:{anchored.line}: an anchor contains itself")
            return self._with(event, None)
        return anchored.node

    def _value(self, event: Any) -> Node:
        self._count(event, 1, 0)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if is_mapping else "seq")):
            self._refuse_tag(event, event.tag)
        self._depth += 1
        node = self._mapping(event) if is_mapping else self._list(event)
        self._depth -= 1
        return node

    def _count(self, event: Any, values: int, height: int) -> None:
        self._values += values
        self._deepest = max(self._deepest, self._depth + height)
        where = f"{self.file}:{_line(event)}"
        if self._deepest > _MAX_DEPTH:
            raise ConfigError(f"{where}: lists and mappings are nested more than {_MAX_DEPTH} deep")
        if self._values > self._most:
            raise ConfigError(f"{where}: more than {self._most} values, an alias counted as what it stands for")

    def _until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _list(self, event: Any) -> Node:
        return self._with(event, tuple(self._node(each) for each in self._until(yaml.SequenceEndEvent)))

    def _mapping(self, event: Any) -> Node:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: list[Node] = []
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                self._problem(key, "a key must be plain text, not a list or a mapping")
                self._node(key)
                self._node(next(self._events))
                continue
            name = self._key(key)
            value = self._node(next(self._events))
            if self._tag(key) == _TAG + "merge":
                merged += value.value if isinstance(value.value, tuple) else [value]
                continue
            if name in entries:
                self._double(key, name, lines[name])
            if name not in entries or self._doubled is not None:
                entries[name], lines[name] = value, _line(key)
        for source in merged:
            if source.mapping is None:
                self.problems.append(f"{source.where}: '<<' can only merge a mapping, not {source}")
            for name, node in (source.mapping or {}).items():
                if name not in entries:
                    entries[name], lines[name] = node, source.key_lines[name]
        return Node(self.file, _line(event), entries, lines)

    def _double(self, event: Any, name: str, first: int) -> None:
        sentence = f"duplicate key {name!r}, first on line {first}"
        if self._doubled is None:
            self._problem(event, f"{sentence}; keep one")
        else:
            self._doubled.append(f"{self.file}:{_line(event)}: {sentence}")

    def _key(self, event: Any) -> str:
        """The text of a key, which may be anchored as any value."""
        text = str(event.value)
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchored(_line(event), self._with(event, text))
        return text

    def _tag(self, event: Any) -> str:
        if event.tag in (None, "!"):
            return str(self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit))
        return str(event.tag)

    def _scalar(self, event: Any) -> Node:
        tag, text = self._tag(event), str(event.value)
        kind = tag.removeprefix(_TAG)
        if kind == "str" or (kind == "timestamp" and not event.style):
            return self._with(event, text)
        if kind not in ("null", "bool", "int", "float"):
            self._refuse_tag(event, tag)
            return self._with(event, None)
        try:
            value: Scalar = getattr(self._constructor, f"construct_yaml_{kind}")(yaml.ScalarNode(tag, text))
        except (ValueError, LookupError, OverflowError):
            self._problem(event, f"{text!r} is not a valid {kind}")
            return self._with(event, None)
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            self._problem(event, f"{text!r} is beyond any whole number that is allowed")
        elif value is not None and _SURPRISES.fullmatch(text):
            self._problem(event, f"{text} is {value} to YAML; write that, or quotes around a text")
        return self._with(event, value)

    def _with(self, event: Any, value: Scalar | tuple[Node, ...]) -> Node:
        return Node(self.file, _line(event), value)

    def _refuse_tag(self, event: Any, tag: str) -> None:
        self._problem(event, f"the tag {tag.replace(_TAG, '!!')} is not allowed; write plain values")

    def _problem(self, event: Any, sentence: str) -> None:
        self.problems.append(f"{self.file}:{_line(event)}: {sentence}")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _misplaced(event: Any, problem: str) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)
