"""Convolution, transposed convolution and linear against int64 arithmetic: not one code may differ."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Codes, Ints, f32
from torch import Tensor, nn

from qlib.lower.base import LOWERINGS, ActivationGrid, LayerContext
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.quant.affine import dequantize
from qlib.quant.plan import LayerPlan, WeightPlan
from qlib.quant.spec import QuantSpec

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
TIE_SCALES = [(2**-4, 2**-5, 1 / 8), (2**-6, 2**-3, 5 / 32), (3 * 2**-6, 2**-4, 3 / 16), (0.013, 2**-7, 3 / 16)]
"""Scales of input and weight, and the requantization factor: k / 2^m, so that many sums land between two codes."""

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 7, 6)),
    "conv2d without bias": (nn.Conv2d(3, 4, (3, 1), bias=False), (2, 3, 5, 5)),
    "conv2d strided": (nn.Conv2d(3, 4, 3, stride=(2, 3), padding=(2, 1)), (1, 3, 9, 9)),
    "conv2d dilated": (nn.Conv2d(2, 4, 3, dilation=2, padding=2), (1, 2, 8, 8)),
    "conv2d grouped": (nn.Conv2d(6, 9, 3, groups=3), (2, 6, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)),
    "conv2d same": (nn.Conv2d(2, 3, (3, 5), padding="same"), (1, 2, 6, 6)),
    "conv2d pointwise": (nn.Conv2d(16, 8, 1), (2, 16, 4, 4)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1), stride=(1, 2, 1)), (1, 2, 4, 6, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (1, 4, 4, 5)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (1, 4, 4, 4)),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False), (1, 4, 3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 2, 3, 2)),
    "linear": (nn.Linear(24, 10), (5, 24)),
    "linear of sequences": (nn.Linear(12, 7, bias=False), (2, 3, 12)),
}


def out_first(module: nn.Module, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``[out, in / groups, ...]``, whatever the layer."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight
    groups = np.split(weight, module.groups)
    return np.concatenate([part.swapaxes(0, 1) for part in groups])


def set_weight(module: nn.Module, mode: str, bits: int, scale: float, rng: np.random.Generator) -> None:
    """Gives the layer a weight whose scale is exactly `scale` in each output channel, and values between codes."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    steps, shift = 2**bits - 1, int(rng.integers(0, 2**bits))
    half = {"sym": steps / 2, "sym_restr": 2 ** (bits - 1) - 1}.get(mode, 0)
    low, high = (-half, half) if half else (-shift, steps - shift)
    values = out_first(module, rng.integers(int(low * 2), int(high * 2) + 1, tuple(weight.shape)) / 2)
    values.reshape(len(values), -1)[:, 0], values.reshape(len(values), -1)[:, 1] = low, high
    back = values
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        back = np.concatenate([part.swapaxes(0, 1) for part in np.split(values, module.groups)])
    weight.data = torch.from_numpy(back * scale).float()
    if isinstance(module.bias, Tensor):
        module.bias.data = torch.from_numpy(rng.normal(0, 40 * scale, len(values))).float()


def accumulate(module: nn.Module, x: Ints, w: Ints) -> Ints:
    """The sums of products of centered codes; `w` in the module's own layout."""
    if isinstance(module, nn.Linear):
        return x @ w.T
    assert isinstance(module, nn.modules.conv._ConvNd)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return oracle.conv_transpose(
            x, w, module.stride, module.padding, module.dilation, module.groups, module.output_padding
        )
    padding = module.padding
    if padding == "same":
        padding = tuple(size // 2 for size in module.kernel_size)
    assert not isinstance(padding, str)
    return oracle.conv(x, w, module.stride, padding, module.dilation, module.groups)


def expected(module: nn.Module, plan: LayerPlan, q: Ints, x: Codes, y: Codes, top: float | None = None) -> Ints:
    """Output codes of the layer."""
    weight, grid = module.weight, plan.weight
    assert isinstance(weight, Tensor)
    assert grid is not None
    values = out_first(module, weight.detach().numpy())
    scale, zero, codes = oracle.weight_grid(values, grid.spec.mode, grid.spec.bits, grid.per_channel)
    centered = codes - zero
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        centered = np.concatenate([part.swapaxes(0, 1) for part in np.split(centered, module.groups)])
    acc = accumulate(module, q - x.zero, centered)
    column = (-1,) if isinstance(module, nn.Linear) else (-1, *[1] * (acc.ndim - 2))
    if isinstance(module.bias, Tensor):
        bias = np.rint(module.bias.detach().numpy() / (x.scale * scale)).astype(np.int64)
        limit = 2 ** (plan.bits_bias - 1)
        acc = acc + np.clip(bias, -limit, limit - 1).reshape(column)
    in_float = max(x.bits, grid.spec.bits, y.bits) > 8 and plan.bits_accum == 32
    limit = 2 ** (62 if in_float else plan.bits_accum - 1)
    factor = (x.scale * scale) / y.scale
    if plan.scale_approx_bits is not None:
        shift = np.floor(np.log2((2**plan.scale_approx_bits - 1) / factor.astype(np.float64)))
        factor = (np.floor(factor * 2**shift) / 2**shift).astype(f32)
    result = oracle.requantize(
        np.clip(acc, -limit, limit - 1), factor.reshape(column) if len(factor) > 1 else factor, y
    )
    return result if top is None else np.clip(result, *y.bounded(top))


def lower(module: nn.Module, plan: LayerPlan, x: Codes, y: Codes, top: float | None = None) -> ExactWeighted:
    output = y.grid if top is None else ActivationGrid.of(y.grid.params, (0.0, top))
    lowered, grid = LOWERINGS["conv"](LayerContext(module, plan, (x.grid,), output))
    assert grid is output
    assert isinstance(lowered, ExactWeighted)
    return lowered


def check(module: nn.Module, plan: LayerPlan, q: Ints, x: Codes, y: Codes, top: float | None = None) -> ExactWeighted:
    lowered = lower(module, plan, x, y, top)
    with torch.inference_mode():
        got = lowered(x.centered(q)).numpy().astype(np.int64) + y.zero
    assert int((got != expected(module, plan, q, x, y, top)).sum()) == 0
    return lowered


def small_codes(x: Codes, rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
    """Codes near zero: the sums are small enough for a large factor, which makes ties frequent."""
    return np.clip(x.zero + rng.integers(-4, 5, shape), x.low, x.high)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_codes_on_ties(name: str, mode: str, per_channel: bool) -> None:
    module, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    for index, (sx, sw, factor) in enumerate(TIE_SCALES):
        set_weight(module, mode, 8, sw, rng)
        plan = LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode(mode, 8, 0 if per_channel else None)))
        x, y = Codes.of("asym_u", 8, sx, 2 * index + 1), Codes.of("asym_u", 8, sx * sw / factor, 101 + index)
        check(module, plan, small_codes(x, rng, shape), x, y, top=[None, np.inf, 6.0, None][index])


@pytest.mark.parametrize("act", MODES)
@pytest.mark.parametrize("bits", [(2, 8), (3, 3), (4, 4), (7, 5), (8, 16), (16, 8), (12, 10), (16, 16)], ids=str)
def test_bits_and_modes_with_random_scales(bits: tuple[int, int], act: str) -> None:
    wide, narrow = bits
    for seed, (name, mode) in enumerate(itertools.product(("conv2d", "linear", "conv2d depthwise"), MODES)):
        module, shape = LAYERS[name]
        rng = np.random.default_rng(seed)
        set_weight(module, mode, narrow, float(rng.uniform(1e-3, 0.1)), rng)
        x = Codes.of(act, wide, rng.uniform(0.01, 1), int(rng.integers(0, 2**wide)))
        y = Codes.of(act, wide, float(x.scale) * 2**narrow * 0.05, int(rng.integers(0, 2**wide)))
        plan = LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode(mode, narrow, 0 if seed % 2 == 0 else None)))
        check(module, plan, x.random(rng, *shape), x, y)


def test_the_scales_above_make_ties() -> None:
    module, shape = LAYERS["conv2d"]
    rng = np.random.default_rng(0)
    for sx, sw, factor in TIE_SCALES:
        set_weight(module, "sym_restr", 8, sw, rng)
        x = Codes.of("asym_u", 8, sx, 7)
        _, zero, w = oracle.weight_grid(module.weight.detach().numpy(), "sym_restr", 8, False)
        values = accumulate(module, small_codes(x, rng, shape) - 7, w - zero) * factor
        assert np.mean(np.mod(values, 1) == 0.5) > 0.02


@pytest.mark.parametrize(
    ("features", "bits", "path"),
    [
        pytest.param(300, (8, 8), "float32", id="below 2^24: one float32 product"),
        pytest.param(900, (8, 8), "two parts", id="above: two parts"),
        pytest.param(1200, (8, 8), "more parts", id="above: more parts"),
        pytest.param(4000, (8, 8), "float64", id="too many parts: float64"),
        pytest.param(64, (16, 16), "float64", id="one product too large: float64"),
    ],
)
def test_large_sums_stay_exact(features: int, bits: tuple[int, int], path: str) -> None:
    rng = np.random.default_rng(1)
    for module, shape in (
        (nn.Linear(features, 16), (6, features)),
        (nn.Conv2d(features // 4, 8, 2), (1, features // 4, 4, 5)),
    ):
        set_weight(module, "asym_s", bits[1], 2**-6, rng)
        module.weight.data.abs_()
        x = Codes.of("asym_u", bits[0], 2**-4, 3)
        q = np.minimum(x.random(rng, *shape) + x.high // 3, x.high)  # one-sided: sums grow
        y = Codes.of("asym_u", 8, 2 ** (bits[0] + bits[1] - 18) * features, 129)
        lowered = check(module, LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("asym_s", bits[1], 0))), q, x, y)
        parts = "float64" if lowered.in_double else ["float32", "two parts", "more parts"][min(len(lowered.cuts), 2)]
        assert parts == path
        with torch.inference_mode():
            acc = np.abs(lowered.accumulate(x.centered(q)).numpy())
        assert (acc.max() > 2**24) == (path != "float32")


@pytest.mark.parametrize("accum", [12, 16, 20, 32])
def test_accumulator_saturates(accum: int) -> None:
    rng = np.random.default_rng(2)
    module = nn.Linear(512, 32)
    set_weight(module, "sym", 8, 2**-5, rng)
    x, y = Codes.of("sym", 8, 2**-4), Codes.of("sym", 16, 2**-7)
    plan = LayerPlan("linear", weight=WeightPlan(QuantSpec.of_mode("sym", 8)), bits_accum=accum)
    check(module, plan, x.random(rng, 20, 512), x, y)


def test_an_accumulator_of_16_and_32_bits_differ() -> None:
    rng = np.random.default_rng(2)
    module = nn.Linear(512, 32)
    set_weight(module, "sym", 8, 2**-5, rng)
    x, y = Codes.of("sym", 8, 2**-4), Codes.of("sym", 16, 2**-7)
    q = x.random(rng, 20, 512)
    outs = [
        lower(module, LayerPlan("linear", weight=WeightPlan(QuantSpec.of_mode("sym", 8)), bits_accum=bits), x, y)(
            x.centered(q)
        )
        for bits in (16, 32)
    ]
    assert not torch.equal(*outs)


@pytest.mark.parametrize("bits", [2, 4, 8, 15])
def test_approximated_factors(bits: int) -> None:
    rng = np.random.default_rng(3)
    module, shape = LAYERS["conv2d"]
    set_weight(module, "sym", 8, 0.013, rng)
    x, y = Codes.of("asym_u", 8, 0.02, 5), Codes.of("asym_u", 8, 0.9, 131)
    plan = LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 8, 0)), scale_approx_bits=bits)
    check(module, plan, x.random(rng, *shape), x, y)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_narrow_bias_saturates(bits: int) -> None:
    rng = np.random.default_rng(4)
    module, shape = LAYERS["linear"]
    set_weight(module, "sym", 8, 2**-5, rng)
    x, y = Codes.of("asym_u", 8, 2**-6), Codes.of("asym_u", 8, 2**-1, 127)
    plan = LayerPlan("linear", weight=WeightPlan(QuantSpec.of_mode("sym", 8)), bits_bias=bits)
    lowered = check(module, plan, x.random(rng, *shape), x, y)
    assert lowered.bias_codes is not None
    assert int(lowered.bias_codes.abs().max()) in (2 ** (bits - 1), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    rng = np.random.default_rng(5)
    module = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    set_weight(module, "sym", 8, 2**-5, rng)
    x, y = Codes.of("asym_u", 8, 2**-6, 77), Codes.of("asym_u", 8, 2**-2, 127)
    q = x.random(rng, 2, 3, 6, 6)
    plan = LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 8)))
    wrap = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    padded = np.pad(q, [(0, 0), (0, 0), (1, 1), (1, 1)], mode=wrap)  # type: ignore[call-overload]
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict(module.state_dict())
    got = lower(module, plan, x, y)(x.centered(q)).detach().numpy().astype(np.int64) + y.zero
    assert (got == expected(plain, plan, padded, x, y)).all()


def test_results_do_not_depend_on_memory_format_or_batch() -> None:
    rng = np.random.default_rng(6)
    module, _ = LAYERS["conv2d"]
    set_weight(module, "sym", 8, 2**-5, rng)
    x, y = Codes.of("asym_u", 8, 2**-6, 77), Codes.of("asym_u", 8, 2**-2, 127)
    lowered = lower(module, LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 8))), x, y)
    codes = x.centered(x.random(rng, 6, 3, 9, 9))
    with torch.inference_mode():
        whole = lowered(codes)
        assert torch.equal(whole, lowered(codes.contiguous(memory_format=torch.channels_last)))
        assert torch.equal(whole, torch.cat([lowered(part) for part in codes.split(1)]))


@pytest.mark.parametrize("name", ["conv2d", "linear", "transposed grouped"])
def test_weights_only(name: str) -> None:
    module, shape = LAYERS[name]
    torch.manual_seed(0)
    module.reset_parameters()  # type: ignore[operator]
    plan = LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("asym_u", 4, 0)))
    lowered, grid = LOWERINGS["conv"](LayerContext(module, plan, (None,), None))
    assert isinstance(lowered, FloatWeighted)
    assert grid is None
    x = torch.randn(shape)
    assert module.weight is not None
    error = (lowered(x) - module(x)).abs().max()
    assert 0 < error < 0.1 * module(x).abs().max() + 0.1
    steps = dequantize(lowered.weight_codes.float(), lowered.weight_params) / lowered.weight_scale.view(
        -1, *[1] * (lowered.weight_codes.ndim - 1)
    )
    assert torch.allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize("output", [True, False], ids=["float in, codes out", "codes in, float out"])
def test_one_side_in_float(output: bool) -> None:
    rng = np.random.default_rng(7)
    module, shape = LAYERS["linear"]
    set_weight(module, "sym", 8, 2**-5, rng)
    grid = Codes.of("asym_u", 8, 2**-2, 127)
    plan = LayerPlan("linear", weight=WeightPlan(QuantSpec.of_mode("sym_restr", 8)))
    context = LayerContext(module, plan, (None if output else grid.grid,), grid.grid if output else None)
    lowered, leaving = LOWERINGS["linear"](context)
    assert leaving is context.output
    q = grid.random(rng, *shape)
    values = grid.centered(q) * float(grid.scale)
    got = lowered(values if output else grid.centered(q)).detach()
    assert torch.equal(got, got.round()) is output
    want = module(values).clamp(-31.75, 32) / 0.25 if output else module(values)
    assert (got - want).abs().max() < 6
