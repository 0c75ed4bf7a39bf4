"""Histograms of fixed size that follow a growing range, and that merge exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "MIN_EXPONENT", "Histogram", "bin_index", "exponent_of"]

BINS = 2048
"""The most bins a histogram has."""

MIN_EXPONENT = -126
"""The finest width is 2^-126, that of float32's smallest normal number."""

_LARGEST_INDEX = 2**22  # finer bins would fall between two float32 numbers, or nearly so
_LARGEST_SHIFT = 62

Counts = npt.NDArray[np.int64]


def bin_index(value: float, exponent: int) -> int:
    """The bin of width ``2^exponent`` that holds a value; bin 0 begins at 0.

    >>> bin_index(1.3, -1), bin_index(-0.1, 0)
    (2, -1)
    """
    return math.floor(math.ldexp(value, -exponent))


def exponent_of(low: float, high: float) -> int:
    """The smallest k for which bins of width 2^k, at multiples of it, cover ``[low, high]`` with at most `BINS` bins.

    It depends on the two ends alone, and a part of a range never needs wider bins than the whole: histograms of parts,
    made each on its own, merge into exactly that of the whole.

    >>> exponent_of(0.0, 1.0), exponent_of(-1.0, 1.0), exponent_of(0.0, 0.0)
    (-10, -9, -126)
    """
    assert low <= high, (low, high)
    exponent = max(
        _magnitude(high - low) - 12,  # with one less, 2048 widths would not reach from low to high
        _magnitude(max(-low, high)) - 23,
        MIN_EXPONENT,
    )
    while not _fits(low, high, exponent):
        exponent += 1
    return exponent


def _magnitude(value: float) -> int:
    """The k for which ``2^(k - 1) <= value < 2^k``; a very small one for 0."""
    return math.frexp(value)[1] if value else MIN_EXPONENT


def _fits(low: float, high: float, exponent: int) -> bool:
    first, last = bin_index(low, exponent), bin_index(high, exponent)
    return last - first < BINS and max(-first, last) <= _LARGEST_INDEX


@dataclass(frozen=True)
class Histogram:
    """How many values lie in ``[low + i * width, low + (i + 1) * width)``, for each i.

    `width` is a power of two and `low` a multiple of it, so that the bins of a wider histogram are whole numbers of
    bins of a narrower one. `zeros` counts, apart from the bins, values that an activation function made exactly 0.

    Laws: at most `BINS` bins; `merge` is associative and commutative, and the histograms of two halves merge into
    exactly the one that `of` makes of the whole.
    """

    low: float
    width: float
    counts: tuple[int, ...]
    zeros: int = 0

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Histogram:
        """The histogram of all values, of which there must be one or more; they are taken as float32.

        >>> Histogram.of([0.0, 1.5, 2047.0]).width, Histogram.of([0.0, 1.5, 2048.0]).width
        (1.0, 2.0)
        """
        x = np.asarray(values, dtype=np.float32).astype(np.float64).ravel()
        low, high = float(x.min()), float(x.max())
        exponent = exponent_of(low, high)
        first = bin_index(low, exponent)
        index = np.floor(np.ldexp(x, -exponent)).astype(np.int64) - first
        counts = np.bincount(index, minlength=bin_index(high, exponent) - first + 1)
        return cls.from_bins(first, exponent, counts)

    @classmethod
    def from_bins(cls, first: int, exponent: int, counts: npt.NDArray[Any], zeros: int = 0) -> Histogram:
        """The histogram whose bins have the numbers `first`, `first` + 1, ... in units of ``2^exponent``."""
        return cls(math.ldexp(first, exponent), math.ldexp(1.0, exponent), tuple(counts.tolist()), zeros)

    @property
    def exponent(self) -> int:
        """``log2(width)``."""
        return math.frexp(self.width)[1] - 1

    @property
    def first(self) -> int:
        """The number of the first bin, ``low / width``."""
        return bin_index(self.low, self.exponent)

    @property
    def high(self) -> float:
        """The upper end of the last bin."""
        return self.low + len(self.counts) * self.width

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts) + self.zeros

    def edges(self) -> npt.NDArray[np.float64]:
        """The ends of the bins, one more than there are bins."""
        return np.arange(self.first, self.first + len(self.counts) + 1, dtype=np.float64) * self.width

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both together; the bins double in width until the range fits.

        >>> merged = Histogram(0.0, 1.0, (1, 2)).merge(Histogram(2.0, 2.0, (5,)))
        >>> merged.low, merged.width, merged.counts
        (0.0, 2.0, (3, 5))
        """
        exponent = max(self.exponent, other.exponent)
        while True:
            parts = [(part.first >> _shift(part, exponent), part._last >> _shift(part, exponent))
                     for part in (self, other)]  # fmt: skip
            first, last = min(part[0] for part in parts), max(part[1] for part in parts)
            if last - first < BINS and max(-first, last) <= _LARGEST_INDEX:
                break
            exponent += 1
        counts: Counts = np.zeros(last - first + 1, dtype=np.int64)
        for part in (self, other):
            index = ((part.first + np.arange(len(part.counts))) >> _shift(part, exponent)) - first
            np.add.at(counts, index, np.array(part.counts, dtype=np.int64))
        return Histogram.from_bins(first, exponent, counts, self.zeros + other.zeros)

    @property
    def _last(self) -> int:
        return self.first + len(self.counts) - 1

    def clipped(self, low: float, high: float) -> Histogram:
        """That of the values held inside ``[low, high]``; with `low` = 0, those below become `zeros`.

        >>> Histogram(-2.0, 1.0, (3, 4, 5, 6)).clipped(0.0, 6.0)
        Histogram(low=0.0, width=1.0, counts=(5, 6), zeros=7)
        >>> Histogram(-2.0, 1.0, (3, 4, 5, 6)).clipped(-1.0, 1.0)
        Histogram(low=-1.0, width=1.0, counts=(7, 11), zeros=0)
        """
        assert low <= 0 <= high, "the ranges of activation functions hold 0"
        exponent = self.exponent
        lowest = bin_index(low, exponent)
        # The end of a bin belongs to the next one, which would reach beyond `high`.
        end = math.ceil(math.ldexp(high, -exponent)) - 1 if high < math.inf else self._last
        highest = max(end, lowest)
        first, last = (min(max(each, lowest), highest) for each in (self.first, self._last))
        counts: Counts = np.zeros(last - first + 1, dtype=np.int64)
        index = np.clip(self.first + np.arange(len(self.counts)), first, last) - first
        np.add.at(counts, index, np.array(self.counts, dtype=np.int64))
        clipped = Histogram.from_bins(first, exponent, counts, self.zeros)
        below = sum(self.counts[: max(lowest - self.first, 0)])
        if low < 0 or not below:
            return clipped
        return replace(clipped, counts=(clipped.counts[0] - below, *clipped.counts[1:]), zeros=self.zeros + below)


def _shift(histogram: Histogram, exponent: int) -> int:
    """How often the width doubles up to ``2^exponent``."""
    return min(exponent - histogram.exponent, _LARGEST_SHIFT)
