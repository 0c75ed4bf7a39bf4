"""Affine quantization: golden values, and laws over random ranges and tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlib.quant.affine import approximate_factor, dequantize, qparams_from_range, quantize, range_of_weight
from qlib.quant.spec import MODES, QuantSpec

modes = st.sampled_from(MODES)
bits = st.integers(2, 16)
numbers = st.floats(-1e6, 1e6, width=32)
relaxed = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("mode", "low", "high", "reciprocal", "zero_point"),
    [
        pytest.param("sym", -4.0, 1.0, 31.875, 0, id="sym, sat from the minimum"),
        pytest.param("sym", -1.0, 4.0, 31.875, 0, id="sym, sat from the maximum"),
        pytest.param("sym_restr", -4.0, 1.0, 31.75, 0, id="sym_restr"),
        pytest.param("asym_u", -2.0, 10.0, 21.25, 42, id="asym_u, z rounds 42.5 to even"),
        pytest.param("asym_s", -2.0, 10.0, 21.25, -86, id="asym_s is asym_u shifted by 128"),
        pytest.param("asym_u", 5.0, 10.0, 25.5, 0, id="asym_u, positive range grows to zero"),
        pytest.param("asym_u", -10.0, -5.0, 25.5, 255, id="asym_u, negative range grows to zero"),
        pytest.param("asym_s", 5.0, 10.0, 25.5, -128, id="asym_s, positive range"),
        pytest.param("asym_s", -10.0, -5.0, 25.5, 127, id="asym_s, negative range"),
        pytest.param("sym", 0.0, 0.0, 1.0, 0, id="sym, nothing but zero"),
        pytest.param("sym_restr", 0.0, 0.0, 1.0, 0, id="sym_restr, nothing but zero"),
        pytest.param("asym_u", 0.0, 0.0, 1.0, 0, id="asym_u, nothing but zero"),
        pytest.param("asym_s", 0.0, 0.0, 1.0, -128, id="asym_s, nothing but zero"),
        pytest.param("asym_u", -1e-44, 1e-44, 1.0, 0, id="asym_u, too small for a float32 step"),
    ],
)
def test_golden_8_bits(mode: str, low: float, high: float, reciprocal: float, zero_point: int) -> None:
    params = qparams_from_range(low, high, QuantSpec.of_mode(mode, 8))
    assert 1 / params.scale.item() == pytest.approx(reciprocal, rel=1e-6)
    assert params.zero_point.item() == zero_point


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (math.nan, 1.0, "range is not finite"),
        (0.0, math.inf, "range is not finite"),
        (-math.inf, 0.0, "range is not finite"),
        (1.0, -1.0, "minimum is above maximum"),
    ],
    ids=["nan", "inf", "-inf", "reversed"],
)
def test_ranges_that_cannot_be(mode: str, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qparams_from_range(low, high, QuantSpec.of_mode(mode, 8))


@pytest.mark.parametrize(
    ("mode", "n", "qmin", "qmax"),
    [
        ("sym", 8, -128, 127),
        ("sym_restr", 8, -127, 127),
        ("asym_s", 4, -8, 7),
        ("asym_u", 4, 0, 15),
        ("sym_restr", 2, -1, 1),
        ("asym_u", 16, 0, 65535),
        ("sym", 32, -(2**31), 2**31 - 1),
    ],
)
def test_code_ranges(mode: str, n: int, qmin: int, qmax: int) -> None:
    spec = QuantSpec.of_mode(mode, n)
    assert (spec.qmin, spec.qmax) == (qmin, qmax)


@given(st.integers(2, 32), st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 3), st.booleans())
def test_a_spec_has_one_spelling(
    n: int, signed: bool, symmetric: bool, restricted: bool, axis: int | None, pow2: bool
) -> None:
    if (symmetric and not signed) or (restricted and not symmetric):
        with pytest.raises(AssertionError):
            QuantSpec(n, signed, symmetric, restricted, axis, pow2)
        return
    spec = QuantSpec(n, signed, symmetric, restricted, axis, pow2)
    assert QuantSpec.of_mode(spec.mode, n, axis, pow2) == spec
    assert spec.qmax - spec.qmin == 2**n - 1 - restricted
    assert (spec.qmin + spec.unsigned_shift, spec.qmax + spec.unsigned_shift) == (int(restricted), 2**n - 1)


@relaxed
@given(modes, bits, numbers, numbers, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_laws_inside_the_range(mode: str, n: int, a: float, b: float, at: list[float]) -> None:
    low, high = min(a, b), max(a, b)
    params = qparams_from_range(low, high, QuantSpec.of_mode(mode, n))
    x = torch.tensor(sorted(low + (high - low) * t for t in at), dtype=torch.float64).float()
    codes = quantize(x, params)
    assert torch.equal(codes, codes.round())
    assert bool((codes >= params.spec.qmin).all())
    assert bool((codes <= params.spec.qmax).all())
    assert bool((codes.diff() >= 0).all()), "monotone"
    scale = params.scale.item()
    half = 0.5 + 0.5 * (mode == "sym")  # the plain symmetric grid ends half a step before +sat
    half += 0.5 * mode.startswith("asym")  # z is rounded, so one end may lie up to half a step beyond the codes
    error = (dequantize(codes, params).double() - x.double()).abs().max().item()
    assert error <= scale * half * (1 + 1e-3) + 1e-6 * max(abs(low), abs(high))
    assert dequantize(quantize(torch.zeros(1), params), params).item() == 0.0, "zero is exact"


@relaxed
@given(modes, bits, numbers, numbers, st.lists(numbers, min_size=1, max_size=20))
def test_codes_stay_on_the_grid_outside_the_range(mode: str, n: int, a: float, b: float, xs: list[float]) -> None:
    params = qparams_from_range(min(a, b), max(a, b), QuantSpec.of_mode(mode, n))
    codes = quantize(torch.tensor([*xs, math.inf, -math.inf]), params)
    assert (codes.max().item(), codes.min().item()) == (params.spec.qmax, params.spec.qmin)


@pytest.mark.parametrize(("mode", "interior"), [("sym", 0.99), ("sym_restr", 1.0), ("asym_u", 0.99), ("asym_s", 0.99)])
def test_round_trip_is_within_half_a_step(mode: str, interior: float) -> None:
    params = qparams_from_range(-3.0, 7.0, QuantSpec.of_mode(mode, 8))
    x = torch.linspace(-3.0, 7.0, 10001) * interior
    assert (dequantize(quantize(x, params), params) - x).abs().max().item() <= params.scale.item() / 2 * (1 + 1e-5)


def test_ties_round_to_even_and_by_division() -> None:
    params = qparams_from_range(-0.3 * 127, 0.3 * 127, QuantSpec.of_mode("sym_restr", 8))
    half_steps = (torch.arange(-200, 200) + 0.5) * params.scale
    expected = [max(-127, min(127, round(float(v)))) for v in half_steps / params.scale]
    assert quantize(half_steps, params).tolist() == expected


@relaxed
@given(modes, bits, st.integers(1, 5), st.integers(0, 2**31))
def test_per_channel_is_per_tensor_of_each_channel(mode: str, n: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, channels, 4, generator=generator) * torch.logspace(-3, 3, channels)[:, None]
    spec = QuantSpec.of_mode(mode, n, axis=1)
    params = qparams_from_range(*range_of_weight(weight, 1), spec)
    codes = quantize(weight, params)
    for channel in range(channels):
        own = weight[:, channel]
        single = qparams_from_range(own.min(), own.max(), QuantSpec.of_mode(mode, n))
        assert torch.equal(single.scale, params.scale[channel])
        assert torch.equal(single.zero_point, params.zero_point[channel])
        assert torch.equal(codes[:, channel], quantize(own, single))
        assert torch.equal(dequantize(codes, params)[:, channel], dequantize(quantize(own, single), single))


def test_a_channel_of_zeros_has_scale_one() -> None:
    weight = torch.stack([torch.zeros(4), torch.ones(4)])
    params = qparams_from_range(*range_of_weight(weight, 0), QuantSpec.of_mode("sym_restr", 8, axis=0))
    assert params.scale.tolist() == pytest.approx([1.0, 1 / 127])


@relaxed
@given(st.floats(1e-6, 100.0), st.integers(2, 16))
def test_approximate_factor_is_just_below(factor: float, m: int) -> None:
    exact: Tensor = torch.tensor([factor], dtype=torch.float64).float()
    approximate = approximate_factor(exact, m).double()
    assert bool((approximate <= exact.double()).all())
    assert bool((approximate >= exact.double() * (1 - 2.0 ** -(m - 1))).all())
    shift = math.floor(math.log2((2**m - 1) / float(exact)))
    assert float(approximate * 2.0**shift).is_integer()


@relaxed
@given(modes, bits, numbers, numbers)
def test_same_grid_and_bounds(mode: str, n: int, a: float, b: float) -> None:
    spec = QuantSpec.of_mode(mode, n)
    one, two = (qparams_from_range(min(a, b), max(a, b), spec) for _ in range(2))
    assert one.same_grid(two)
    assert not one.same_grid(qparams_from_range(min(a, b) - 10.0, max(a, b) + 10.0, spec))
    assert int(one.low) <= 0 <= int(one.high)
