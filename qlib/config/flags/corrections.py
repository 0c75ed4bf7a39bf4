"""The corrections, as their files register them: their order, their flags and what they need. None is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlib.config.flags.names import flag_of
from qlib.registry import registered
from qlib.values import FrozenMapping, Interval

__all__ = ["BIAS_CORRECTIONS", "CORRECTION_FLAGS", "ROUNDINGS", "CorrectionFlag", "Number", "Switches"]


@dataclass(frozen=True)
class Number:
    """What the flag of a correction gives it: a number from `low` to `high`, as its argument `name`."""

    name: str
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """The numbers that it may be."""
        return Interval(self.low, self.high)


@dataclass(frozen=True)
class CorrectionFlag:
    """How a correction is asked for, and when it is done: in the `order` of all.

    It is one value of the flag `choice`, or has a flag of its own with a text of `help`: a switch, or a `number`.
    `of_float`: it changes the float model before statistics are collected; others come after the plan. `images`,
    `iterates`: it looks at calibration images, and in how many steps it optimizes can be said. `data_free`: that flag
    asks for it too, in place of others of its `choice`.
    """

    name: str
    order: float = math.inf
    choice: str = ""
    of_float: bool = False
    images: bool = False
    iterates: bool = False
    data_free: bool = False
    number: Number | None = None
    help: str = ""

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return flag_of(f"ptq.{self.choice or self.name}")

    @property
    def default(self) -> bool | None:
        """The value of its own flag where that is not given."""
        return None if self.number else False


def _flag(name: str, *, module: str, number: Mapping[str, object] | None = None, **facts: object) -> CorrectionFlag:
    return CorrectionFlag(name, number=Number(**number) if number else None, **facts)  # type: ignore[arg-type]


CORRECTION_FLAGS: Mapping[str, CorrectionFlag] = {
    name: _flag(name, **facts) for name, facts in registered("qlib.correct").items()
}
"""Name -> how it is asked for, in the order in which they are done."""

ROUNDINGS = ("nearest", *(name for name, each in CORRECTION_FLAGS.items() if each.choice == "rounding"))
BIAS_CORRECTIONS = ("none", *(name for name, each in CORRECTION_FLAGS.items() if each.choice == "bias_correction"))


class Switches(FrozenMapping[float]):
    """The corrections asked for by a flag of their own -> True, or the number that the flag was given.

    >>> Switches({"equalize": True, "absorb_bias": False, "smooth": None})
    Switches({'equalize': True})
    """

    def __init__(self, values: Mapping[str, float | None] | None = None) -> None:
        given = {name: value for name, value in (values or {}).items() if value != CORRECTION_FLAGS[name].default}
        super().__init__({name: value for name, value in given.items() if value is not None})
