"""What kind of integers a tensor is quantized to; no tensors here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODES", "QuantSpec"]

MODES = ("sym", "sym_restr", "asym_s", "asym_u")


@dataclass(frozen=True)
class QuantSpec:
    """An integer grid: `bits`, signedness, whether zero is in the middle, and the channel axis (None: per tensor).

    Laws: `qmin` and `qmax` are computed here and nowhere else; a symmetric spec is signed and has zero point 0;
    `restricted` drops the most negative code so that the codes are symmetric; `pow2` allows only scales 2^k; one bit is
    unsigned: the codes 0 and 1.

    >>> QuantSpec.of_mode("sym", 8).qmin, QuantSpec.of_mode("sym_restr", 8).qmin, QuantSpec.of_mode("asym_u", 8).qmax
    (-128, -127, 255)
    """

    bits: int
    signed: bool
    symmetric: bool
    restricted: bool = False
    axis: int | None = None
    pow2: bool = False

    def __post_init__(self) -> None:
        assert (2 if self.signed else 1) <= self.bits <= 32, self.bits
        assert self.signed or not self.symmetric
        assert self.symmetric or not self.restricted

    @classmethod
    def of_mode(cls, mode: str, bits: int, axis: int | None = None, pow2: bool = False) -> QuantSpec:
        """The spec of a mode of the command line: sym, sym_restr, asym_s or asym_u."""
        assert mode in MODES, mode
        return cls(bits, mode != "asym_u", mode.startswith("sym"), mode == "sym_restr", axis, pow2)

    @property
    def mode(self) -> str:
        """The name of this kind of grid on the command line and in files: `of_mode` understands it.

        >>> QuantSpec(8, signed=True, symmetric=True, restricted=True).mode
        'sym_restr'
        """
        if self.symmetric:
            return "sym_restr" if self.restricted else "sym"
        return "asym_s" if self.signed else "asym_u"

    @property
    def qmin(self) -> int:
        """The smallest code."""
        if not self.signed:
            return 0
        return int(self.restricted) - (1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - int(self.signed))) - 1
