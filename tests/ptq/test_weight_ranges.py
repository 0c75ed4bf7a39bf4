"""Ranges of weights: each method against the values themselves, and what reaches the integer layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.clip.weights import WEIGHT_METHODS, WeightContext, rounding_error
from qlib.graph import capture
from qlib.graph.weights import swap_channels
from qlib.lower import lower
from qlib.ptq.weight_ranges import plan_weight
from qlib.quant.affine import qparams_from_range
from qlib.quant.clip_names import WEIGHT_CLIPS, ClipParameters
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import MODES, QuantSpec

rows_of_values = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.lists(st.floats(-4, 4, width=32), min_size=9, max_size=9), min_size=rows, max_size=rows
    ).map(lambda values: torch.tensor(values, dtype=torch.float32))
)
contexts = st.builds(
    lambda mode, bits, pow2, percentile, p: WeightContext(
        QuantSpec.of_mode(mode, bits, 0, pow2), ClipParameters({"clip_percentile": percentile, "clip_p": p})
    ),
    st.sampled_from(MODES),
    st.integers(2, 8),
    st.booleans(),
    st.floats(50.5, 100),
    st.floats(1, 4),
)


def test_the_names_of_the_config_are_those_of_the_registry() -> None:
    assert tuple(WEIGHT_METHODS) == WEIGHT_CLIPS


@settings(deadline=None)
@given(rows_of_values, contexts, st.sampled_from(sorted(WEIGHT_METHODS)))
def test_no_method_leaves_the_values(rows: Tensor, context: WeightContext, method: str) -> None:
    low, high = WEIGHT_METHODS[method](rows, context)
    least, most = rows.amin(1), rows.amax(1)
    assert bool((low <= high).all())
    assert bool(((torch.clamp(least, max=0.0) <= low) & (high <= torch.clamp(most, min=0.0))).all())


@settings(deadline=None)
@given(rows_of_values, contexts)
def test_mse_and_lp_are_never_worse_than_none(rows: Tensor, context: WeightContext) -> None:
    for method, p in (("mse", 2.0), ("lp", context.clip_parameters["clip_p"])):
        got = rounding_error(rows, *WEIGHT_METHODS[method](rows, context), context.spec, p)
        assert bool((got <= rounding_error(rows, rows.amin(1), rows.amax(1), context.spec, p)).all())


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_u"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_near_the_best_of_a_fine_search(mode: str, bits: int) -> None:
    rows = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [1.0], [-0.3]])
    rows[1, 5] = 15.0
    context = WeightContext(QuantSpec.of_mode(mode, bits, 0))
    got = rounding_error(rows, *WEIGHT_METHODS["mse"](rows, context), context.spec)
    shares = torch.linspace(0.03, 1.0, 40).tolist()
    tried = [
        rounding_error(rows, rows.amin(1) * a, rows.amax(1) * b, context.spec)
        for a in shares
        for b in (shares if mode == "asym_u" else [a])
    ]
    assert bool((got <= 1.05 * torch.stack(tried).amin(0)).all())


def test_a_large_tensor_is_sampled() -> None:
    rows = torch.randn(1, 2**21 + 5 * 10**5, generator=torch.Generator().manual_seed(0))
    context = WeightContext(QuantSpec.of_mode("sym", 4, 0))
    _, high = WEIGHT_METHODS["mse"](rows, context)
    assert float(high) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_plan_has_a_range_for_the_tensor_or_for_each_channel(per_channel: bool) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    plan = plan_weight(
        WeightPlan(QuantSpec.of_mode("sym_restr", 3, 0 if per_channel else None)), weight, "mse", ClipParameters()
    )
    assert plan.min is not None
    assert plan.max is not None
    assert (plan.clip, len(plan.min), len(plan.max)) == ("mse", 6 if per_channel else 1, 6 if per_channel else 1)
    params = plan.qparams(weight)
    assert params.scale.shape == ((6,) if per_channel else ())
    plain = WeightPlan(QuantSpec.of_mode("sym_restr", 3, 0 if per_channel else None))
    assert plan_weight(plain, weight, "none", ClipParameters()) == plain


def test_auto_takes_what_has_the_least_error_and_nothing_without_need() -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert plan_weight(WeightPlan(QuantSpec.of_mode("sym", 2, 0)), weight, "auto", ClipParameters()).clip == "mse"
    grid = torch.tensor([[-0.7, 0.3, 0.7, 0.1, -0.5]])
    assert plan_weight(WeightPlan(QuantSpec.of_mode("sym_restr", 4, 0)), grid, "auto", ClipParameters()).clip == "none"


def test_channels_of_a_transposed_convolution() -> None:
    """Each of two groups has outputs of its own: the ranges come in the order in which the layer is computed."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    with torch.no_grad():
        scales = torch.tensor([[1.0, 8.0, 64.0]] * 2 + [[4.0, 0.5, 16.0]] * 2)
        layer.weight.mul_(scales[..., None, None])
    plan = plan_weight(
        WeightPlan(QuantSpec.of_mode("sym", 8, 0)), swap_channels(layer, layer.weight.detach()), "mse", ClipParameters()
    )
    images = torch.randn(2, 4, 3, 3)
    graph = capture(nn.Sequential(layer), images)
    (name,) = [node.meta["name"] for node in graph.graph.nodes if node.op == "call_module"]
    grid = TensorPlan(QuantSpec.of_mode("asym_s", 14), min=-100.0, max=100.0)
    lowered = lower(graph, Plan({name: LayerPlan("conv_transpose", (grid,), plan, grid)}))
    with torch.inference_mode():
        worst = (lowered(images) - layer(images)).abs().amax((0, 2, 3)) / layer(images).abs().amax((0, 2, 3))
    assert float(worst.max()) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_powers_of_two(mode: str) -> None:
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    context = WeightContext(QuantSpec.of_mode(mode, 4, 0, pow2=True))
    scale = qparams_from_range(*WEIGHT_METHODS["mse"](rows, context), context.spec).scale
    whole = qparams_from_range(rows.amin(1), rows.amax(1), context.spec).scale
    assert bool((torch.frexp(scale)[0] == 0.5).all())
    assert bool((scale <= whole).all())
