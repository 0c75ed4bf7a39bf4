"""One rounding: every body of ``clamp(round(x / s) + z)`` gives the quantized values of `quant.affine`, to the bit.

Layouts, gradients and speed are why there is more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.lower.base import ActivationGrid, Grid
from qlib.lower.dynamic import quantize_each
from qlib.lower.fake import FakeQuantize, FakeWeight, fake_quantize
from qlib.lower.qdq_layer import FromCodes, ToCodes
from qlib.qat.base import ActivationSite
from qlib.qat.few_codes import ClippedActivation, CodedWeight
from qlib.qat.methods.lsq import LsqActivation, LsqWeight
from qlib.qat.methods.lsq_plus import LsqPlusActivation
from qlib.qat.methods.range_linear_qat import EmaActivation, RangeWeight
from qlib.quant.affine import QParams, dequantize, qparams_from_range, quantize
from qlib.quant.plan import TensorPlan, WeightPlan
from qlib.quant.spec import MODES, QuantSpec
from qlib.search.replay import rounded

Body: TypeAlias = Callable[[Tensor, QParams], Tensor]
"""(x, grid) -> x on the grid."""

LARGEST = torch.finfo(torch.float32).max
modes, bits, pow2 = st.sampled_from(MODES), st.integers(2, 16), st.booleans()
ends = (
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]) | st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32)
)
relaxed = settings(max_examples=100, deadline=None)


def channel(params: QParams, index: int) -> QParams:
    """The grid of one channel, as one of a whole tensor."""
    mode, n, power = params.spec.mode, params.spec.bits, params.spec.pow2
    return QParams(params.scale[index], params.zero_point[index], QuantSpec.of_mode(mode, n, pow2=power))


@st.composite
def grids(draw: st.DrawFn) -> QParams:
    """Of one to three channels; ranges of nothing but zero are among them."""
    spec = draw(st.builds(QuantSpec.of_mode, modes, bits, st.just(0), pow2))
    limits = [sorted(draw(st.tuples(ends, ends))) for _ in range(draw(st.integers(1, 3)))]
    low, high = torch.tensor(limits, dtype=torch.float64).T
    return qparams_from_range(low, high, spec)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, QParams]:
    """A grid, and for each channel ties, values of the grid and beyond, what is next to 0, and the largest floats."""
    params = draw(grids())
    reach = 2**params.spec.bits
    halves = draw(st.lists(st.integers(-2 * reach, 2 * reach), min_size=4, max_size=12))
    others = draw(st.lists(st.floats(-LARGEST, LARGEST, width=32), max_size=4))
    fixed = torch.tensor([0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, *others])
    on_grid = torch.tensor(halves) / 2 * params.scale[:, None]
    near = torch.nextafter(on_grid, torch.zeros(()))
    return torch.cat([fixed.expand(len(on_grid), -1), on_grid, near], 1), params


def on_grid(x: Tensor, params: QParams) -> Tensor:
    """What all others must give."""
    return dequantize(quantize(x, params), params)


def by_channel(body: Body) -> Body:
    """A body that knows one scale only, for each channel alone."""
    return lambda x, params: torch.stack([body(row, channel(params, i)) for i, row in enumerate(x)])


def _exact(x: Tensor, params: QParams) -> Tensor:
    centered = Grid(ActivationGrid.of(params)).quantize(x.clone())
    assert torch.equal(centered, quantize(x, params) - params.zero_point)
    return centered * params.scale


def _deployed(x: Tensor, params: QParams) -> Tensor:
    grid = ActivationGrid.of(params)
    codes = ToCodes(grid)(x)
    assert torch.equal(codes, grid.codes(quantize(x, params) - params.zero_point))
    return FromCodes(grid)(codes)


def _fake(x: Tensor, params: QParams) -> Tensor:
    scale, low, high = (each[:, None] for each in (params.scale, params.low.float(), params.high.float()))
    return fake_quantize(x, scale, low, high)


BODIES: dict[str, Body] = {
    "exact": by_channel(_exact),
    "deployed": by_channel(_deployed),
    "fake": by_channel(lambda x, params: fake_quantize(x, params.scale, params.low, params.high)),
    "fake activation": by_channel(lambda x, params: FakeQuantize(ActivationGrid.of(params))(x)),
    "fake but for some": by_channel(
        lambda x, params: fake_quantize(x, params.scale, params.low, params.high, torch.zeros_like(x, dtype=torch.bool))
    ),
    "fake of each channel": _fake,
    "replay": by_channel(lambda x, params: rounded(x, ActivationGrid.of(params))),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@relaxed
@given(cases())
def test_on_a_given_grid(body: Body, case: tuple[Tensor, QParams]) -> None:
    x, params = case
    before = x.clone()
    assert torch.equal(body(x, params), on_grid(x, params))
    assert torch.equal(x, before), "the input stays as it is"


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_of_more_values_than_are_taken_at_once(body: Body) -> None:
    x = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    params = qparams_from_range(x.amin(1) / 2, x.amax(1) / 2, QuantSpec.of_mode("asym_u", 8, 0))
    assert torch.equal(body(x, params), on_grid(x, params))


rows = st.lists(st.lists(ends, min_size=3, max_size=3), min_size=1, max_size=3).map(torch.tensor)


@relaxed
@given(rows, modes, bits, pow2, st.booleans())
@example(torch.zeros(2, 3), "sym", 8, False, True)
def test_on_the_grid_of_its_own_range(x: Tensor, mode: str, n: int, power: bool, per_channel: bool) -> None:
    spec = QuantSpec.of_mode(mode, n, 0 if per_channel else None, power)
    plan = WeightPlan(spec)
    expected = on_grid(x, plan.qparams(x))
    layer = nn.Linear(x.shape[1], len(x))
    with torch.no_grad():
        layer.weight.copy_(x)
    assert torch.equal(FakeWeight(layer, plan)(layer.weight), expected)
    assert torch.equal(RangeWeight(spec, stochastic=False, folds=False)(x)[0], expected)
    if per_channel:  # as each image of a dynamic plan
        codes, scale = quantize_each("layer", x, TensorPlan(QuantSpec.of_mode(mode, n, pow2=power)))
        assert torch.equal(codes * scale, expected)


class _FixedStep(CodedWeight):
    """On a given grid, which is symmetric and restricted."""

    def __init__(self, params: QParams) -> None:
        super().__init__(params.spec.bits, stochastic=False, per_channel=True)
        self.fixed = params.scale

    def scale_of(self, weight: Tensor) -> Tensor:
        return self.fixed


@relaxed
@given(cases())
def test_of_weights_in_training(case: tuple[Tensor, QParams]) -> None:
    x, params = case
    if params.spec.mode == "sym_restr":
        for quantizer in (_FixedStep(params), LsqWeight(params)):
            assert torch.equal(quantizer(x)[0], on_grid(x, quantizer.grid(x)))


@relaxed
@given(cases(), st.booleans())
def test_of_activations_in_training(case: tuple[Tensor, QParams], relu: bool) -> None:
    x, params = case[0], channel(case[1], 0)
    quantizers: list[nn.Module] = [LsqActivation(params, relu)]
    quantizers.append(EmaActivation(ActivationSite(params.spec.bits, params, relu)).eval())
    if relu:
        quantizers.append(ClippedActivation(params.spec.bits, params.scale * params.high))
    elif not params.spec.signed:
        quantizers.append(LsqPlusActivation(params))
    for quantizer in quantizers:
        assert torch.equal(quantizer(x), on_grid(x.relu() if relu else x, quantizer.params)), type(quantizer)
