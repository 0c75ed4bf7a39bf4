"""Histograms: the laws of merging, what they count, and what activation functions make of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlib.stats.histogram import BINS, Histogram, bin_index, exponent_of
from qlib.stats.histogram_rows import HistogramRows
from qlib.stats.tensor_stats import TensorStats

floats = st.floats(-(2.0**100), 2.0**100, width=32)
moderate = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
near = st.floats(-4, 4, width=32)
lists = st.one_of(st.lists(floats, min_size=1, max_size=30), st.lists(near, min_size=1, max_size=60))


@given(lists)
def test_every_value_is_counted_in_its_bin(values: list[float]) -> None:
    histogram = Histogram.of(values)
    assert histogram.total == len(values)
    assert len(histogram.counts) <= BINS
    assert histogram.low <= min(values) <= max(values) < histogram.high
    assert math.frexp(histogram.width)[0] == 0.5
    for value in values:
        index = bin_index(value, histogram.exponent) - histogram.first
        assert histogram.counts[index] > 0


@given(lists, lists)
def test_two_halves_are_the_whole(one: list[float], other: list[float]) -> None:
    assert Histogram.of(one).merge(Histogram.of(other)) == Histogram.of(one + other)


@given(lists, lists, lists)
def test_merging_is_commutative_and_associative(one: list[float], two: list[float], three: list[float]) -> None:
    a, b, c = Histogram.of(one), Histogram.of(two).clipped(0.0, math.inf), Histogram.of(three)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(st.lists(st.lists(moderate, min_size=1, max_size=40), min_size=1, max_size=6))
def test_rows_that_grow_are_the_whole(batches: list[list[float]]) -> None:
    rows, seen = HistogramRows.empty(2, torch.device("cpu")), list[float]()
    for batch in batches:
        seen += batch
        values = [None, torch.tensor(batch, dtype=torch.float32)]
        rows = rows.add(values, [0.0, min(seen)], [0.0, max(seen)])
        rows = HistogramRows.of_state(rows.state(), torch.device("cpu"))
    assert rows.row(1, min(seen), max(seen)) == Histogram.of(seen)
    assert not rows.counts[0].any()


def test_adding_leaves_the_rows_before_as_they_were() -> None:
    before = HistogramRows.empty(1, torch.device("cpu"))
    before.add([torch.ones(3)], [1.0], [1.0])
    assert not before.counts.any()


@given(st.lists(near, min_size=1, max_size=60), st.sampled_from([(0.0, math.inf), (0.0, 2.0), (-1.5, 1.5)]))
def test_clipping_keeps_every_value(values: list[float], limits: tuple[float, float]) -> None:
    low, high = limits
    histogram = Histogram.of(values)
    clipped = histogram.clipped(low, high)
    assert clipped.total == histogram.total
    assert clipped.low >= low - histogram.width
    assert clipped.high <= max(high, 0.0) + histogram.width
    if low == 0.0:
        assert clipped.zeros == sum(value < 0 for value in values)
        assert clipped.low >= 0.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(0.0, 2047.0, 0, id="as many bins as there are"),
        pytest.param(0.0, 2048.0, 1, id="one too many"),
        pytest.param(-1024.0, 1023.5, 0, id="both signs"),
        pytest.param(2.0**22, 2.0**22, 0, id="a constant far from 0: no finer than float32"),
        pytest.param(0.0, 0.0, -126, id="zero"),
        pytest.param(-3.4e38, 3.4e38, 118, id="all of float32"),
    ],
)
def test_width(low: float, high: float, expected: int) -> None:
    assert exponent_of(low, high) == expected


def test_merging_keeps_the_statistics_of_halves() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=100), generator.normal(3.0, 2.0, size=50)

    def stats(x: np.ndarray) -> TensorStats:
        return TensorStats(x.size, 1, float(x.min()), float(x.max()), histogram=Histogram.of(x))

    assert stats(one).merge(stats(other)).histogram == Histogram.of(np.concatenate([one, other]))
    assert stats(one).merge(TensorStats(1, 1, 0.0, 1.0)).histogram is None
