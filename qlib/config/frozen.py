"""A mapping that does not change, so that frozen dataclasses can hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

__all__ = ["FrozenMapping"]

T = TypeVar("T")


class FrozenMapping(Mapping[str, T]):
    """Text to values, hashable. It equals any mapping of the same items.

    >>> FrozenMapping({"a": 1}), hash(FrozenMapping({"a": 1})) == hash(FrozenMapping({"a": 1}))
    (FrozenMapping({'a': 1}), True)
    """

    def __init__(self, items: Mapping[str, T] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items})"
