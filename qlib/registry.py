"""Names to things: each family of methods (clip method, quantizer, layer kind, ...) has one registry."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from qlib.errors import QlibError, did_you_mean

__all__ = ["Registry", "registered"]

T = TypeVar("T")


@functools.cache
def registered(package: str) -> Mapping[str, Mapping[str, Any]]:
    """What the files of a package register: name -> facts, as ``@REGISTRY.register("name", fact=value)`` spells them.

    The files are read, not imported: a command line can be understood, and `--help` printed, without what they need. A
    file whose name begins with an underscore registers nothing. The order is that of the fact `order`, where there is
    one, then that of the names.

    >>> list(registered("qlib.clip"))[:2], "auto" in registered("qlib.clip")
    (['none', 'avg'], True)
    """
    root, *rest = package.split(".")
    spec = importlib.util.find_spec(root)  # of the root alone: to find a package would import those that it is in
    assert spec is not None
    assert spec.submodule_search_locations is not None
    rows: dict[str, dict[str, Any]] = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder, *rest).glob("[!_]*.py")):
            for name, facts in _rows(path):
                rows[name] = {**facts, "module": f"{package}.{path.stem}"}
    last = float("inf")
    return dict(sorted(rows.items(), key=lambda row: (row[1].get("order", last), row[0])))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and facts of each registration in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register":
                facts = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
                yield ast.literal_eval(call.args[0]), facts


class Registry(Generic[T]):
    """A read-mostly map from names to objects of one kind.

    With a `package`, the names are those that its files register, and a file is imported when one of them is asked for:
    a new method is one new file.

    Laws: a name is registered once; iteration is in the order of `registered`, without a package in that of
    registration; an unknown name is a user's mistake and suggests the nearest names.

    >>> clips: Registry[int] = Registry("clip method")
    >>> clips.add("none", 1)
    >>> clips["none"], list(clips)
    (1, ['none'])
    >>> clips["nome"]
    Traceback (most recent call last):
    qlib.errors.QlibError: unknown clip method 'nome'; allowed: none; did you mean none?
    """

    def __init__(self, what: str, package: str | None = None) -> None:
        self.what = what
        self.package = package
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Registers `item`; a second one of the same name is a programmer's mistake."""
        assert name not in self._items, f"{self.what} {name!r} is registered twice"
        self._items[name] = item

    def register(self, name: str, **facts: object) -> Callable[[T], T]:
        """Decorator form of `add`; `facts` are literals about the item, for `registered` and `facts`."""

        def decorate(item: T) -> T:
            self.add(name, item)
            return item

        return decorate

    def facts(self, name: str) -> Mapping[str, Any]:
        """What the registration of an item of a package says about it."""
        assert self.package is not None
        return registered(self.package)[name]

    def _names(self) -> Mapping[str, object]:
        return self._items if self.package is None else {**registered(self.package), **self._items}

    def __getitem__(self, name: str) -> T:
        names = self._names()
        if name not in names:
            allowed = ", ".join(names)
            raise QlibError(f"unknown {self.what} {name!r}; allowed: {allowed}{did_you_mean(name, names)}")
        if name not in self._items:
            importlib.import_module(self.facts(name)["module"])
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())
