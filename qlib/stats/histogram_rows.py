"""The histograms of many tensors while they are collected: one row of counts for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.stats.histogram import BINS, MIN_EXPONENT, Histogram, bin_index, exponent_of

__all__ = ["HistogramRows"]


@dataclass(frozen=True)
class HistogramRows:
    """`counts` ``[E, BINS]``: row e counts values in bins of width ``2^exponents[e]``, from bin number `bases[e]` on.

    Memory is fixed. A row's bins lie anywhere about the range seen so far, so that most batches move nothing; `row`
    gives the histogram that `Histogram.of` would have made (but that negative values too small for float32 to hold
    their share of a bin count as 0).
    """

    counts: Tensor
    exponents: tuple[int, ...]
    bases: tuple[int, ...]

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> HistogramRows:
        counts = torch.zeros(rows, BINS, dtype=torch.int64, device=device)
        return cls(counts, (MIN_EXPONENT,) * rows, (0,) * rows)

    def add(self, values: Sequence[Tensor | None], low: Sequence[float], high: Sequence[float]) -> HistogramRows:
        """With the values of one more batch, which are overwritten; a row of None stays as it is.

        `low` and `high` are the ends of all that was seen of each tensor, this batch included.
        """
        counts, exponents, bases = self.counts.clone(), list(self.exponents), list(self.bases)
        for row, batch in enumerate(values):
            if batch is None:
                continue
            exponent = max(exponents[row], exponent_of(low[row], high[row]))
            shift = min(exponent - exponents[row], 62)
            first, last = bin_index(low[row], exponent), bin_index(high[row], exponent)
            base = bases[row] >> shift
            if not base <= first <= last < base + BINS:
                base = (first + last + 1 - BINS) // 2
            if shift or base != bases[row]:
                counts[row] = _moved(counts[row], bases[row], shift, base)
            exponents[row], bases[row] = exponent, base
            index = batch.view(-1).mul_(2.0**-exponent).floor_().sub_(base)
            counts[row] += torch.bincount(index.to(torch.int16), minlength=BINS)  # 16 bits: half the time
        return HistogramRows(counts, tuple(exponents), tuple(bases))

    def row(self, row: int, low: float, high: float) -> Histogram:
        """The histogram of one tensor, whose ends are `low` and `high`."""
        first, last = (bin_index(end, self.exponents[row]) for end in (low, high))
        base = self.bases[row]
        counts = self.counts[row, first - base : last - base + 1]
        return Histogram.from_bins(first, self.exponents[row], counts.cpu().numpy())

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors, for a file."""
        places = {"exponents": self.exponents, "bases": self.bases}
        return {"counts": self.counts.cpu(), **{name: torch.tensor(place) for name, place in places.items()}}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], device: torch.device) -> HistogramRows:
        """What `state` was of."""
        places = (tuple(state[name].tolist()) for name in ("exponents", "bases"))
        return cls(state["counts"].to(device), *places)


def _moved(counts: Tensor, base: int, shift: int, new_base: int) -> Tensor:
    """Counts on a grid whose bins are ``2^shift`` times as wide and begin at `new_base`."""
    index = ((torch.arange(BINS, device=counts.device) + base) >> shift) - new_base
    return torch.zeros_like(counts).index_add_(0, index.clamp_(0, BINS - 1), counts)  # only empty bins are outside
