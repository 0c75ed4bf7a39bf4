"""Budgets of mixed precision, as text: ``3.2MB``, ``4.5bits``, ``12GBOPs``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["UNITS", "Budget", "parse_budget"]

_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES, _MEAN, _OPERATIONS = "B", "bits", "BOPs"
_MOST = 1e15
UNITS = (_BYTES, _MEAN, _OPERATIONS)


@dataclass(frozen=True)
class Budget:
    """`amount` times `prefix` of a unit.

    ``B``: bytes of the weights, each at its bits, those left in float at 32; not of biases and scales.
    ``bits``: the mean of the same over all weights. ``BOPs``: bit operations, the sum over layers of their
    multiply-accumulates times the bits of their two operands (weight and input).
    """

    amount: float
    prefix: str
    unit: str

    def limit(self, weights: int) -> int:
        """The budget as a whole number: of bits of all `weights`, or of bit operations.

        >>> parse_budget("0.5KB").limit(1000), parse_budget("4.5 bits").limit(1001), parse_budget("2gbops").limit(7)
        (4000, 4504, 2000000000)
        """
        factor = 8 if self.unit == _BYTES else weights if self.unit == _MEAN else 1
        return math.floor(self.amount * _PREFIX[self.prefix.lower()] * factor + 1e-6)

    def text(self, cost: int, weights: int) -> str:
        """The smallest budget in this unit that allows `cost`, to four digits.

        >>> parse_budget("3MB").text(1_234_567, 1000), parse_budget("3bits").text(4100, 1000)
        ('0.1544MB', '4.1bits')
        """
        factor = 8 if self.unit == _BYTES else weights if self.unit == _MEAN else 1
        exact = cost / (_PREFIX[self.prefix.lower()] * factor)
        digits = 3 - math.floor(math.log10(exact)) if exact > 0 else 0
        rounded = f"{math.ceil(round(exact * 10**digits, 6)) / 10**digits:.{max(digits, 0)}f}"
        return f"{rounded.rstrip('0').rstrip('.') if '.' in rounded else rounded}{self.prefix}{self.unit}"

    def __str__(self) -> str:
        return f"{Decimal(f'{self.amount:.10g}'):f}{self.prefix}{self.unit}"


def parse_budget(text: str) -> Budget:
    """The budget that a text stands for, with units in any case. Raises ValueError for any other text.

    >>> str(parse_budget("3.20 mb")), str(parse_budget("12gBops")), str(parse_budget("20000000000b"))
    ('3.2MB', '12GBOPs', '20000000000B')
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]?)(b|bops)|(bits?))", text.strip(), re.IGNORECASE)
    if found is None or not 0 < float(found[1]) <= _MOST:
        raise ValueError(text)
    if found[4]:
        return Budget(float(found[1]), "", _MEAN)
    unit = _BYTES if found[3].lower() == "b" else _OPERATIONS
    return Budget(float(found[1]), found[2].upper(), unit)
