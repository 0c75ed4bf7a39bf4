"""What one value may be: shared by the flags, the YAML files, the plans and the statistics."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Interval"]


@dataclass(frozen=True)
class Interval:
    """The finite numbers from `low` to `high`; an `open` end is not one of them.

    >>> share = Interval.of("[0, 1)")
    >>> 0 in share, 1 in share, str(share), str(Interval.of("(50, 100]")), str(Interval.of("(0, inf)"))
    (True, False, 'from 0 to below 1', 'above 50 and at most 100', 'above 0')
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    @classmethod
    def of(cls, text: str) -> Interval:
        """The interval in mathematical notation."""
        found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text)
        assert found, f"{text!r} is no interval such as (0, 1]"
        return cls(float(found[2]), float(found[3]), found[1] == "(", found[4] == ")")

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
        if self.high == math.inf:
            return start
        links = ("and at most", "and below") if self.open_low else ("to", "to below")
        return f"{start} {links[self.open_high]} {self.high:g}"
