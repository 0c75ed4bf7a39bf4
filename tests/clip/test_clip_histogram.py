"""Clip methods that answer from a histogram: their laws, and plain implementations beside them."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.clip import CLIP_METHODS, ClipContext, choose
from qlib.clip._search import expected_error
from qlib.clip.kl import divergences
from qlib.errors import StatsError
from qlib.ptq.activation_ranges import clipped
from qlib.quant.affine import qparams_from_range
from qlib.quant.clip_names import CLIP_NAMES, HISTOGRAM_CLIPS, ClipParameters
from qlib.quant.spec import MODES, QuantSpec
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats


def context(bits: int = 8, symmetric: bool = False) -> ClipContext:
    return ClipContext(QuantSpec.of_mode("sym" if symmetric else "asym_u", bits))


def stats_of(values: npt.ArrayLike) -> TensorStats:
    """The statistics of values, with their histogram."""
    x = np.asarray(values, dtype=np.float32).astype(np.float64)
    low, high, mean = float(x.min()), float(x.max()), float(x.mean())
    b = float(np.abs(x - mean).mean())
    return TensorStats(x.size, 1, low, high, low, high, mean, float(x.std()), b, histogram=Histogram.of(x))


def relu(stats: TensorStats) -> TensorStats:
    return clipped(stats, 0.0, max(stats.max, 0.0))


@functools.cache
def samples(name: str) -> TensorStats:
    generator = np.random.default_rng(0)
    draw = {
        "normal": lambda: generator.normal(0.3, 1.0, 40_000),
        "laplace": lambda: generator.laplace(0.0, 1.0, 40_000),
        "outlier": lambda: np.append(generator.normal(0.0, 1.0, 40_000), 100.0),
        "far": lambda: generator.normal(50.0, 1.0, 40_000),
        "constant": lambda: np.full(10, 3.0),
        "zero": lambda: np.zeros(10),
    }
    if name == "relu":
        return relu(samples("normal"))
    return stats_of(draw[name]())


NAMES = ("normal", "laplace", "outlier", "far", "constant", "zero", "relu")


def error(stats: TensorStats, limits: tuple[float, float], given_context: ClipContext, p: float = 2.0) -> float:
    assert stats.histogram is not None
    low, high = np.array([limits[0]]), np.array([limits[1]])
    return float(expected_error(stats.histogram, low, high, given_context, p)[0])


@pytest.mark.parametrize(
    ("method", "name", "given_context", "expected"),
    [
        pytest.param("mse", "normal", context(4, True), (-2.77, 2.77), id="mse of a normal tensor: mean + 2.5 std"),
        pytest.param("mse", "laplace", context(4, True), (-4.9, 4.9), id="mse of a Laplace tensor: near 5.03 b"),
        pytest.param("mse", "constant", context(8), (3.0, 3.0), id="mse of a constant"),
        pytest.param("kl", "zero", context(4), (0.0, 0.0), id="kl of zeros"),
        pytest.param("kl", "normal", context(16), (-4.19, 5.03), id="kl with more levels than bins keeps all"),
        pytest.param("percentile", "zero", context(4), (0.0, 0.0), id="percentile of zeros"),
        pytest.param("percentile", "normal", context(4), (-3.57, 4.2), id="percentile 99.99"),
        pytest.param("percentile", "relu", context(4), (0.0, 4.2), id="percentile of a ReLU"),
    ],
)
def test_range_from_histogram(
    method: str, name: str, given_context: ClipContext, expected: tuple[float, float]
) -> None:
    assert CLIP_METHODS[method](samples(name), given_context) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("method", HISTOGRAM_CLIPS)
def test_without_a_histogram_the_flag_is_named(method: str) -> None:
    with pytest.raises(StatsError, match=r"^the statistics hold no histogram, .* --qe-histograms$"):
        CLIP_METHODS[method](TensorStats(1, 1, 0.0, 1.0), context())


parameters = st.fixed_dictionaries({"clip_percentile": st.floats(50.5, 100), "clip_p": st.floats(1, 4)})
histogram_contexts = st.builds(
    ClipContext,
    st.builds(QuantSpec.of_mode, st.sampled_from(MODES), st.integers(2, 16), pow2=st.booleans()),
    st.booleans(),
    parameters.map(ClipParameters),
)
value_lists = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=200)


@settings(deadline=None)
@given(value_lists, st.booleans(), histogram_contexts, st.sampled_from(HISTOGRAM_CLIPS))
def test_no_method_leaves_what_was_seen(
    values: list[float], after_relu: bool, any_context: ClipContext, method: str
) -> None:
    stats = relu(stats_of(values)) if after_relu else stats_of(values)
    low, high = CLIP_METHODS[method](stats, any_context)
    assert stats.min <= low <= high <= stats.max


@settings(deadline=None)
@given(value_lists, histogram_contexts)
def test_mse_and_lp_are_never_worse_than_none(values: list[float], any_context: ClipContext) -> None:
    stats = stats_of(values)
    for method, p in (("mse", 2.0), ("lp", any_context.clip_parameters["clip_p"])):
        got = error(stats, CLIP_METHODS[method](stats, any_context), any_context, p)
        assert got <= error(stats, (stats.min, stats.max), any_context, p) * (1 + 1e-9) + 1e-15


@settings(deadline=None)
@given(value_lists, st.floats(50.5, 100), st.floats(50.5, 100), st.booleans())
def test_percentile_is_monotone(values: list[float], one: float, other: float, symmetric: bool) -> None:
    stats = stats_of(values)

    def kept(p: float) -> tuple[float, float]:
        parameters = ClipParameters({"clip_percentile": p})
        return CLIP_METHODS["percentile"](stats, replace(context(8, symmetric), clip_parameters=parameters))

    narrow, wide = kept(min(one, other)), kept(max(one, other))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]
    assert kept(100.0) == (stats.min, stats.max)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.integers(2, 6), st.data())
def test_divergence_is_that_of_the_plain_algorithm(counts: list[int], levels: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(counts) - 1))
    end = data.draw(st.integers(start + 1, len(counts)))
    if end - start < levels:
        return
    got = divergences(np.array(counts), np.array([start]), np.array([end]), levels)[0]
    assert got == pytest.approx(plain_divergence(counts, start, end, levels), abs=1e-12)


def plain_divergence(counts: list[int], start: int, end: int, levels: int) -> float:
    """Bin by bin, as the slides tell it."""
    reference = [float(count) for count in counts[start:end]]
    reference[0] += sum(counts[:start])
    reference[-1] += sum(counts[end:])
    inside, size = counts[start:end], end - start
    candidate = [0.0] * size
    for level in range(levels):
        bins = [i for i in range(size) if i * levels // size == level]
        filled = [i for i in bins if inside[i]]
        for i in filled:
            candidate[i] = sum(inside[j] for j in bins) / len(filled)
    if not sum(counts):
        return 0.0
    if not sum(candidate):
        return math.inf
    total, divergence = sum(candidate), 0.0
    for p, q in zip(reference, candidate, strict=True):
        if p:
            if not q:
                return math.inf
            divergence += p / sum(counts) * math.log((p / sum(counts)) / (q / total))
    return divergence


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_u"])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_expected_error_is_that_of_quantized_values(bits: int, mode: str, pow2: bool, p: float) -> None:
    """On a histogram with narrow bins, against the codes that the exact arithmetic gives."""
    generator = np.random.default_rng(1)
    histogram = Histogram.of(generator.normal(0.5, 1.0, 20_000))
    inside = (np.arange(64) + 0.5) / 64 * histogram.width
    x = torch.from_numpy((histogram.edges()[:-1, None] + inside).ravel())
    weights = torch.tensor(histogram.counts, dtype=torch.float64).repeat_interleave(64) / 64
    spec = QuantSpec.of_mode(mode, bits, pow2=pow2)
    for limits in ((-3.0, 4.0), (-1.0, 1.5)):
        params = qparams_from_range(*limits, spec)
        scale, zero = params.scale.double(), params.zero_point.double()
        codes = (torch.round(x / scale) + zero).clamp(params.spec.qmin, params.spec.qmax)
        want = float((((codes - zero) * scale - x).abs() ** p * weights).sum() / weights.sum())
        got = float(expected_error(histogram, np.array([limits[0]]), np.array([limits[1]]), ClipContext(spec), p)[0])
        assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_finds_what_a_fine_search_finds(name: str, bits: int, symmetric: bool) -> None:
    stats, given_context = samples(name), context(bits, symmetric)
    got = error(stats, CLIP_METHODS["mse"](stats, given_context), given_context)
    shares = np.linspace(0.02, 1.0, 60)
    tried = [error(stats, (stats.min * a, stats.max * b), given_context) for a in shares for b in shares[::3]]
    assert got <= min(tried) * 1.02 + 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_auto_is_within_a_hundredth_of_the_best(name: str, bits: int) -> None:
    stats, given_context = samples(name), context(bits)
    chosen, limits = choose(stats, given_context)
    assert chosen in CLIP_NAMES
    assert chosen != "auto"
    for method in ("none", "percentile", "kl", "mse"):
        other = error(stats, CLIP_METHODS[method](stats, given_context), given_context)
        assert error(stats, limits, given_context) <= 1.01 * other + 1e-15


def test_auto_prefers_the_simplest_and_leaves_out_what_cannot_answer() -> None:
    assert choose(samples("constant"), context(8))[0] == "none"
    assert choose(replace(samples("outlier"), mean=None, std=None), context(4))[0] in ("mse", "lp", "kl", "percentile")


def test_power_of_two_scales_round_down_where_that_is_better() -> None:
    """With 4 bits, steps of 2^k round up to 0.5 for the whole of a normal tensor, and down to 0.25 for most of it."""
    stats = samples("normal")
    spec = QuantSpec.of_mode("sym", 3, pow2=True)
    whole = qparams_from_range(stats.min, stats.max, spec)
    best = qparams_from_range(*CLIP_METHODS["mse"](stats, ClipContext(spec)), spec)
    assert float(best.scale) < float(whole.scale)
