"""The number format of affine quantization: which integers a tensor is quantized to. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODES", "QuantSpec"]

_MODES = {
    "sym": (True, True, False),
    "sym_restr": (True, True, True),
    "asym_s": (True, False, False),
    "asym_u": (False, False, False),
}
"""Name on the command line and in files -> signed, symmetric, restricted."""
MODES = tuple(_MODES)


@dataclass(frozen=True)
class QuantSpec:
    """Affine integers: bit-width, signedness, symmetry, and the channel axis of the scales (None: one per tensor).

    Laws: `qmin` and `qmax` are computed here and nowhere else; a symmetric spec is signed and has zero point 0;
    `restricted` drops the most negative integer, so that ``qmin == -qmax``; `pow2` allows only scales 2^k; one bit is
    unsigned: 0 and 1; ``QuantSpec.of_mode(spec.mode, spec.bits, spec.axis, spec.pow2) == spec``.

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
        assert (self.signed, self.symmetric, self.restricted) in _MODES.values()

    @classmethod
    def of_mode(cls, mode: str, bits: int, axis: int | None = None, pow2: bool = False) -> QuantSpec:
        """The spec of a mode as files and the command line spell it: sym, sym_restr, asym_s or asym_u."""
        return cls(bits, *_MODES[mode], axis, pow2)

    @property
    def mode(self) -> str:
        """How files and the command line spell signedness and symmetry: what `of_mode` reads.

        >>> QuantSpec(8, signed=True, symmetric=True, restricted=True).mode
        'sym_restr'
        """
        own = self.signed, self.symmetric, self.restricted
        return next(mode for mode, flags in _MODES.items() if flags == own)

    @property
    def unsigned_shift(self) -> int:
        """What deployment adds to quantized values and zero point, to store signed ones as unsigned ones."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def qmin(self) -> int:
        """The smallest quantized value."""
        if not self.signed:
            return 0
        return int(self.restricted) - (1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest quantized value."""
        return (1 << (self.bits - int(self.signed))) - 1
