"""Names to things: each family of methods (clip, quantizer, layer kind, ...) has one registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from qlib.errors import QlibError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A read-mostly map from names to objects of one kind.

    Laws: a name is registered once; iteration is in order of registration; an unknown name is a user's mistake
    and suggests the nearest names.

    >>> clips: Registry[int] = Registry("clip method")
    >>> clips.add("none", 1)
    >>> clips["none"], list(clips)
    (1, ['none'])
    >>> clips["nome"]
    Traceback (most recent call last):
    qlib.errors.QlibError: unknown clip method 'nome'; allowed: none; did you mean none?
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Registers `item`; a second one of the same name is a programmer's mistake."""
        assert name not in self._items, f"{self.what} {name!r} is registered twice"
        self._items[name] = item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def decorate(item: T) -> T:
            self.add(name, item)
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            allowed = ", ".join(self._items)
            raise QlibError(f"unknown {self.what} {name!r}; allowed: {allowed}{did_you_mean(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
