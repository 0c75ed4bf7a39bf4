"""What one value may be: shared by the flags, the YAML files, the plans and the statistics.

A flag holds text, YAML holds text, numbers, true and false. Each `Value` says how the former becomes the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qlib.errors import did_you_mean

__all__ = ["FLAG", "FrozenMapping", "Interval", "TooLarge", "Value", "among", "choice", "real", "text", "whole"]


T = TypeVar("T")

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

_MOST = 10**9
"""The largest whole number where nothing else bounds it: what counts things fits into any integer of a library."""


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high` that are finite in float32; an `open` end is not one of them.

    >>> share = Interval(0, 1, open_high=True)
    >>> 0 in share, 1 in share, str(share), str(Interval(50, 100, open_low=True)), str(Interval(0, open_low=True))
    (True, False, 'from 0 to below 1', 'above 50 and at most 100', 'above 0')
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return above and below and -_FLOAT32_MAX <= number <= _FLOAT32_MAX

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
        if self.high == math.inf:
            return start
        links = ("and at most", "and below") if self.open_low else ("to", "to below")
        return f"{start} {links[self.open_high]} {self.high:g}"


@dataclass(frozen=True)
class Value:
    """What one value may be, and the words for that.

    `read` gives the value of what YAML holds, and raises ValueError where that is not allowed. `parse` makes of a text
    what YAML would hold, and raises ValueError where it cannot. `names` are those to suggest from.

    >>> whole(1, 9).read(3), whole(1, 9).read(whole(1, 9).parse("3")), whole(1, 9).allowed
    (3, 3, 'a whole number from 1 to 9')
    """

    read: Callable[[Any], Any]
    allowed: str
    parse: Callable[[str], Any] = str
    names: tuple[str, ...] = ()

    def accepts(self, raw: object) -> bool:
        """Whether what YAML holds is allowed.

        >>> FLAG.accepts(True), FLAG.accepts(1)
        (True, False)
        """
        try:
            self.read(raw)
        except ValueError:
            return False
        return True

    def hint(self, raw: object) -> str:
        """What continues the words for what is allowed: how large a number may be, or the names that may be meant.

        >>> choice(("sym", "asym_u")).hint("asymu"), whole(1).hint(10**30)
        ('; did you mean asym_u or sym?', ', and at most 1000000000')
        """
        try:
            self.read(raw)
        except TooLarge as error:
            return str(error)
        except ValueError:
            pass
        return did_you_mean(raw.lower(), self.names) if isinstance(raw, str) else ""

    def or_null(self, words: str, meaning: object = None) -> Value:
        """This, or null, which means something.

        >>> whole(1, 8).or_null("or null for 1", 1).read(None)
        1
        """
        return replace(
            self, read=lambda raw: meaning if raw is None else self.read(raw), allowed=f"{self.allowed}, {words}"
        )


def _require(accepted: bool) -> None:
    if not accepted:
        raise ValueError


class TooLarge(ValueError):
    """A number that is refused for its size alone; its text continues the words for what is allowed."""


def whole(low: int, high: int | None = None) -> Value:
    """A whole number from `low` to `high`; neither true nor 3.0 is one.

    >>> whole(1).read(10**30)
    Traceback (most recent call last):
    qlib.values.TooLarge: , and at most 1000000000
    """

    def read(raw: object) -> int:
        if type(raw) is not int or raw < low or (high is not None and raw > high):
            raise ValueError
        if high is None and raw > _MOST:
            raise TooLarge(f", and at most {_MOST}")
        return raw

    span = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
    return Value(read, str(low) if low == high else span, int)


def real(interval: Interval, words: str = "") -> Value:
    """A number of an interval.

    >>> share = real(Interval(0, 1))
    >>> share.read(1), share.accepts(1.5), share.accepts(True), share.allowed
    (1.0, False, False, 'a number from 0 to 1')
    """

    def read(raw: object) -> float:
        if type(raw) not in (int, float):
            raise ValueError
        if _FLOAT32_MAX < raw < math.inf == interval.high:  # type: ignore[operator]
            raise TooLarge(f", and at most {_FLOAT32_MAX:.3g}")
        if raw not in interval:  # type: ignore[operator]
            raise ValueError
        return float(raw)  # type: ignore[arg-type]

    return Value(read, words or f"a number {interval}", float)


def choice(allowed: Iterable[str] | Mapping[str, str], *, any_case: bool = True) -> Value:
    """One of some names, in any case unless that matters; a mapping gives what each stands for.

    >>> choice({"symmetric": "sym"}).read("Symmetric")
    'sym'
    """
    names = tuple(allowed)
    meaning = allowed if isinstance(allowed, Mapping) else {name: name for name in names}

    def read(raw: object) -> str:
        word = raw.lower() if isinstance(raw, str) and any_case else raw
        _require(word in names)
        return meaning[str(word)]

    return Value(read, ", ".join(names), names=names)


def among(*numbers: int) -> Value:
    """One of some whole numbers.

    >>> among(16, 32).allowed, among(16, 32).accepts(16), among(16, 32).accepts(16.0)
    ('16, 32', True, False)
    """

    def read(raw: object) -> object:
        _require(type(raw) is int and raw in numbers)
        return raw

    return Value(read, ", ".join(map(str, numbers)), int)


def text(words: str, *, empty: bool = False) -> Value:
    """Some text, not empty unless that is allowed."""

    def read(raw: object) -> str:
        _require(isinstance(raw, str) and bool(raw or empty))
        return str(raw)

    return Value(read, words)


def _flag(raw: object) -> bool:
    _require(isinstance(raw, bool))
    return raw is True


def _true_or_false(word: str) -> bool:
    _require(word in ("True", "False"))
    return word == "True"


FLAG = Value(_flag, "true or false", _true_or_false)


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
