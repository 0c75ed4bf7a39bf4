"""Clip methods: their formulas, their tables, and what holds for any statistics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlib.clip import CLIP_METHODS, ClipContext, gauss, laplace
from qlib.errors import StatsError
from qlib.quant.clip_names import CLIP_NAMES, HISTOGRAM_CLIPS, ClipParameters
from qlib.quant.spec import QuantSpec
from qlib.stats.tensor_stats import TensorStats

STATS = TensorStats(
    count=100, samples=10, min=-3.0, max=9.0, avg_min=-2.0, avg_max=6.0, mean=1.0, std=2.0, b=1.5, shape=(10, 10)
)


def context(bits: int = 8, symmetric: bool = False, half_range: bool = False, n_stds: float = 2.0) -> ClipContext:
    spec = QuantSpec.of_mode("sym" if symmetric else "asym_u", bits)
    return ClipContext(spec, half_range, ClipParameters({"clip_n_stds": n_stds}))


@pytest.mark.parametrize(
    ("method", "given_context", "expected"),
    [
        pytest.param("none", context(), (-3.0, 9.0), id="none"),
        pytest.param("avg", context(), (-2.0, 6.0), id="avg"),
        pytest.param("n_std", context(n_stds=1.5), (-2.0, 4.0), id="n_std inside"),
        pytest.param("n_std", context(n_stds=3.0), (-3.0, 7.0), id="n_std held at min"),
        pytest.param("gauss", context(4, symmetric=True), (-6.1, 6.1), id="gauss sym: |mean| + 2.55 std"),
        pytest.param("gauss", context(4), (-2.0, 8.2), id="gauss asym starts at avg_min, 5.1 std wide"),
        pytest.param("gauss", context(1), (-1.48, 3.48), id="gauss asym starts at mean - 1.24 std"),
        pytest.param("gauss", context(4, half_range=True), (-2.0, 3.86), id="gauss half: 2.93 std wide"),
        pytest.param("gauss", context(4, True, True), (-6.1, 6.1), id="gauss sym ignores the half"),
        pytest.param("laplace", context(8, symmetric=True), (-15.835, 15.835), id="laplace sym: |mean| + 9.89 b"),
        pytest.param("laplace", context(3), (-2.0, 9.67), id="laplace asym: 7.78 b wide"),
        pytest.param("laplace", context(3, half_range=True), (-2.0, 5.53), id="laplace half: 5.02 b wide"),
    ],
)
def test_range(method: str, given_context: ClipContext, expected: tuple[float, float]) -> None:
    assert CLIP_METHODS[method](STATS, given_context) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "field"),
    [("avg", "avg_min"), ("avg", "avg_max"), ("n_std", "std"), ("gauss", "mean"), ("gauss", "std"), ("laplace", "b")],
)
def test_missing_statistic_is_named(method: str, field: str) -> None:
    stats = TensorStats(**{**vars(STATS), field: None})
    with pytest.raises(StatsError, match=f"lack '{field}'"):
        CLIP_METHODS[method](stats, context())


@pytest.mark.parametrize("module", [gauss, laplace], ids=["gauss", "laplace"])
def test_solution_agrees_with_the_printed_tables(module: object) -> None:
    for bits, printed in module._ALPHA.items():  # type: ignore[attr-defined]
        assert module.solve_alpha(bits) == pytest.approx(printed, rel=0.005)  # type: ignore[attr-defined]
    for bits, printed in module._ALPHA_HALF.items():  # type: ignore[attr-defined]
        assert module.solve_alpha(bits + 1) == pytest.approx(printed, rel=0.005)  # type: ignore[attr-defined]


def test_the_names_of_the_config_are_those_of_the_registry() -> None:
    assert set(CLIP_NAMES) == set(CLIP_METHODS)


values = st.floats(-1e6, 1e6)
widths = st.floats(0, 1e6)


@st.composite
def tensor_stats(draw: st.DrawFn) -> TensorStats:
    low, avg_low, mean, avg_high, high = sorted(draw(st.tuples(*[values] * 5)))
    return TensorStats(10, 1, low, high, avg_low, avg_high, mean, std=draw(widths), b=draw(widths))


contexts = st.builds(context, st.integers(2, 16), st.booleans(), st.booleans(), st.floats(0.01, 10))


@given(tensor_stats(), contexts, st.sampled_from(sorted(set(CLIP_METHODS) - set(HISTOGRAM_CLIPS))))
def test_every_method_gives_an_ordered_range(stats: TensorStats, any_context: ClipContext, method: str) -> None:
    low, high = CLIP_METHODS[method](stats, any_context)
    assert low <= high


@given(tensor_stats(), contexts, st.sampled_from(["avg", "n_std"]))
def test_cutting_methods_stay_inside_what_was_seen(stats: TensorStats, any_context: ClipContext, method: str) -> None:
    low, high = CLIP_METHODS[method](stats, any_context)
    assert stats.min <= low <= high <= stats.max


@given(tensor_stats(), st.floats(0.01, 10), st.floats(0.01, 10))
def test_more_standard_deviations_never_narrow(stats: TensorStats, one: float, other: float) -> None:
    narrow = CLIP_METHODS["n_std"](stats, context(n_stds=min(one, other)))
    wide = CLIP_METHODS["n_std"](stats, context(n_stds=max(one, other)))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@given(tensor_stats(), st.integers(2, 15), st.booleans(), st.booleans(), st.sampled_from(["gauss", "laplace"]))
def test_more_bits_reach_further(stats: TensorStats, bits: int, symmetric: bool, half: bool, method: str) -> None:
    few = CLIP_METHODS[method](stats, context(bits, symmetric, half))
    many = CLIP_METHODS[method](stats, context(bits + 1, symmetric, half))
    assert many[0] <= few[0]
    assert many[1] - many[0] >= few[1] - few[0]
