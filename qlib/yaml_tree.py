"""YAML as a tree that remembers where everything stood; nothing in a file can run code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from qlib.errors import ConfigError

__all__ = ["Node", "Scalar", "load_yaml", "parse_yaml"]

Scalar: TypeAlias = "bool | int | float | str | None"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}


@dataclass(frozen=True)
class Node:
    """One value of a YAML file, with its place.

    `value` is a scalar, a tuple of nodes (a list) or a dict of nodes in the file's order (a mapping). Keys are the
    text that stands in the file, whatever YAML takes it for: a layer may be called `0` or `on`.
    """

    file: str
    line: int
    value: Scalar | tuple[Node, ...] | Mapping[str, Node]
    key_lines: Mapping[str, int] = field(default_factory=dict)

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


def load_yaml(path: str | Path) -> Node:
    """The tree of a file with one YAML document.

    Raises:
        ConfigError: the file cannot be read, or for what `parse_yaml` says.
    """
    return parse_yaml(_read(str(path)), str(path))


def parse_yaml(text: str, file: str) -> Node:
    """The tree of one YAML document; `file` is what error messages call it.

    >>> parse_yaml("bits: 4", "a.yaml").mapping["bits"]
    Node(file='a.yaml', line=1, value=4, key_lines={})

    Raises:
        ConfigError: the text is empty or is not YAML; or it has tabs in its indentation, duplicate keys or tags such as
            `!!python/object`: all of those, each with `file:line`.
    """
    tabs = [n for n, line in enumerate(text.split("\n"), 1) if "\t" in line[: len(line) - len(line.lstrip(" \t"))]]
    if tabs:
        raise ConfigError([f"{file}:{n}: a tab in the indentation; YAML allows only spaces" for n in tabs])
    try:
        _check_depth(file, text)
        root = yaml.compose(text, Loader=_LOADER)
        if root is None:
            raise ConfigError(f"{file}:1: the file is empty")
        reader = _Reader(file)
        node = reader.convert(root)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(file, text, error)) from None
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no file in UTF-8 can hold
        line = text.count("\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {text[error.start]!r} is no character") from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return node


def _check_depth(file: str, text: str) -> None:
    """Stops before `compose`, which is recursive and in C: a file nested without end would crash the process."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1
            raise ConfigError(f"{file}:{line}: lists and mappings are nested more than {_MAX_DEPTH} deep")


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


def _syntax_problem(file: str, text: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = f" ({error.context})" if error.context else ""
        return f"{file}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}{context}"
    line = text.count("\n", 0, getattr(error, "position", 0)) + 1
    return f"{file}:{line}: not valid YAML: {getattr(error, 'reason', error)}"


class _Reader:
    """Turns composed YAML nodes into `Node`s and collects the problems on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[str] = []
        self._done: dict[int, Node | None] = {}
        self._scalars: Any = yaml.constructor.SafeConstructor()

    def convert(self, raw: Any) -> Node:
        """The node of `raw`; an aliased one is converted once (None marks one under way)."""
        if id(raw) not in self._done:
            self._done[id(raw)] = None
            self._done[id(raw)] = self._convert(raw)
        node = self._done[id(raw)]
        if node is None:
            self._problem(raw, "an anchor contains itself")
            return self._node(raw, None)
        return node

    def _convert(self, raw: Any) -> Node:
        if isinstance(raw, yaml.MappingNode) and raw.tag == _TAG + "map":
            return self._mapping(raw)
        if isinstance(raw, yaml.SequenceNode) and raw.tag == _TAG + "seq":
            return self._node(raw, tuple(self.convert(item) for item in raw.value))
        if isinstance(raw, yaml.ScalarNode):
            return self._node(raw, self._scalar(raw))
        self._problem(raw, f"the tag {_short(raw.tag)} is not allowed; write plain values")
        return self._node(raw, None)

    def _mapping(self, raw: Any) -> Node:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: list[Node] = []
        for key, value in raw.value:
            if not isinstance(key, yaml.ScalarNode):
                self._problem(key, "a key must be plain text, not a list or a mapping")
            elif key.tag == _TAG + "merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                merged += [self.convert(source) for source in sources]
            elif key.value in entries:
                self._problem(key, f"duplicate key {key.value!r}, first on line {lines[key.value]}; keep one")
            else:
                entries[key.value] = self.convert(value)
                lines[key.value] = key.start_mark.line + 1
        for source in merged:
            if source.mapping is None:
                self.problems.append(f"{source.where}: '<<' can only merge a mapping, not {source}")
            for name, node in (source.mapping or {}).items():
                if name not in entries:
                    entries[name], lines[name] = node, source.key_lines[name]
        return Node(self.file, raw.start_mark.line + 1, entries, lines)

    def _scalar(self, raw: Any) -> Scalar:
        if raw.tag == _TAG + "timestamp" and raw.style is None:
            return str(raw.value)
        if raw.tag not in _SCALAR_TAGS:
            self._problem(raw, f"the tag {_short(raw.tag)} is not allowed; write plain values")
            return None
        try:
            value: Scalar = self._scalars.construct_object(raw)
        except (ValueError, KeyError):
            self._problem(raw, f"{raw.value[:40]!r} is not a valid {raw.tag.removeprefix(_TAG)}")
            return None
        return value

    def _node(self, raw: Any, value: Scalar | tuple[Node, ...]) -> Node:
        return Node(self.file, raw.start_mark.line + 1, value)

    def _problem(self, raw: Any, sentence: str) -> None:
        self.problems.append(f"{self.file}:{raw.start_mark.line + 1}: {sentence}")


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")
