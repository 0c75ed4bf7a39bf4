"""Every method of training keeps the laws of its interface, computes its paper's formula, and deploys exactly."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.app.policies import SECTIONS
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.errors import ModelError
from qlib.graph import capture, fold_batch_norm
from qlib.lower import lower
from qlib.lower.trainable import (
    ActivationQuantizer,
    TrainableLayer,
    WeightQuantizer,
    connect,
    convert,
    prepare_qat,
    trainable_layers,
)
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.qat.assignment import CommonArguments
from qlib.qat.base import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.qat.few_codes import CodedWeight
from qlib.qat.methods.binary_connect import BinaryWeight
from qlib.qat.methods.dorefa import DorefaGradient
from qlib.qat.methods.lsq_plus import LsqPlusActivation
from qlib.qat.methods.range_linear_qat import EmaActivation
from qlib.quant.affine import QParams, dequantize, qparams_from_range, quantize, range_of_grid
from qlib.quant.plan import Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats
from qlib.surgery.widen import widened

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "QuantAwareTrainRangeLinearQuantizer": [{"mode_activations": mode, "mode_weights": mode} for mode in MODES],
    "DorefaQuantizer": [{"bits_gradients": 8}],
    "PACTQuantizer": [{"act_clip_init_val": 3.0, "act_clip_decay": 1e-3}],
    "BinaryConnectQuantizer": [{}, {"stochastic": True}],
}
METHODS: list[TrainingQuantizer] = [
    TRAINING_QUANTIZERS[name](**options) for name in TRAINING_QUANTIZERS for options in OPTIONS.get(name, [{}])
]
IDS = [
    "-".join([type(m).__name__, *(str(v) for v in dataclasses.astuple(m) if isinstance(v, (str, bool)) and v)])  # type: ignore[call-overload]
    for m in METHODS
]
every_method = pytest.mark.parametrize("method", METHODS, ids=IDS)


def weight_site(method: TrainingQuantizer, weight: Tensor, bits: int, per_channel: bool = False) -> WeightSite:
    mode = str(method.planning["mode_weights"])
    start = WeightPlan(QuantSpec.of_mode(mode, max(bits, 2), 0 if per_channel else None)).qparams(weight)
    return WeightSite(weight, bits, start)


def activation_site(method: TrainingQuantizer, bits: int, relu: bool, low: float = -2.0) -> ActivationSite:
    spec = QuantSpec.of_mode(str(method.planning["mode_activations"]), bits)
    return ActivationSite(bits, qparams_from_range(0.0 if relu else low, 3.0, spec), relu)


def allowed_weight_bits(method: TrainingQuantizer) -> range:
    return range(method.min_bits, 9)


def random_weight(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.2


def random_images(seed: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, 8, 5, 5, generator=torch.Generator().manual_seed(seed)) * 1.5


# Laws of the interface


def test_the_keys_of_yaml_are_the_fields() -> None:
    classes = SECTIONS["quantizers"].classes
    assert list(classes) == list(TRAINING_QUANTIZERS)
    common = [field.name for field in dataclasses.fields(CommonArguments)]
    for name, arguments in classes.items():
        own = [field.name for field in dataclasses.fields(TRAINING_QUANTIZERS[name])]  # type: ignore[arg-type]
        if "mode_activations" in own:
            own = [*(each for each in own if not each.startswith("mode_")), "mode"]
        assert list(arguments.fields) == [*common, *own], name


@every_method
def test_every_key_but_a_switch_says_what_it_may_be(method: TrainingQuantizer) -> None:
    for field in (*dataclasses.fields(CommonArguments), *dataclasses.fields(method)):  # type: ignore[arg-type]
        plain = field.type == "bool" or field.name.startswith("mode_")
        assert ("value" in field.metadata) is not plain, field.name


@every_method
def test_what_is_planned_are_settings_of_layers(method: TrainingQuantizer) -> None:
    assert set(method.planning) <= {field.name for field in dataclasses.fields(LayerSettings)}
    assert {"mode_activations", "mode_weights"} <= set(method.planning)


@pytest.mark.parametrize("per_channel", [False, True])
@every_method
def test_weights_are_codes_times_scale(method: TrainingQuantizer, per_channel: bool) -> None:
    for bits in allowed_weight_bits(method):
        weight = random_weight(bits)
        quantizer = method.weight(weight_site(method, weight, bits, per_channel)).eval()
        rounded, scale = quantizer(weight)
        grid = quantizer.grid(weight)
        assert torch.equal(scale, grid.scale)
        assert not scale.requires_grad
        codes = quantize(rounded, grid)
        assert torch.equal(dequantize(codes, grid), rounded)
        assert grid.spec.qmin <= codes.min() <= codes.max() <= grid.spec.qmax
        assert quantizer.folds or (grid.spec.symmetric and grid.spec.restricted)
        assert (rounded - weight).abs().mean() < 1.1 * weight.abs().mean()  # it stands for the weight
        for value, seen in ((rounded, scale), (grid.scale, grid.zero_point)):
            assert torch.isfinite(value).all()
            assert torch.isfinite(seen).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@every_method
def test_a_weight_of_zeros_or_of_one_value_has_a_grid(method: TrainingQuantizer, bits: int) -> None:
    if bits < method.min_bits:
        pytest.skip("not allowed")
    for value in (0.0, 0.25):
        weight = torch.full((3, 2, 1, 1), value, requires_grad=True)
        quantizer = method.weight(weight_site(method, weight.detach(), bits, True))
        rounded, _ = quantizer(weight)
        rounded.sum().backward()
        assert torch.isfinite(rounded).all()
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
        quantizer.grid(weight)


@pytest.mark.parametrize("relu", [False, True])
@every_method
def test_activations_are_on_their_grid_monotone_and_idempotent(method: TrainingQuantizer, relu: bool) -> None:
    x = torch.linspace(-6, 9, 4001).view(1, -1)
    unsigned = str(method.planning["mode_activations"]) == "asym_u"
    for bits in range(1 if unsigned else 2, 9):
        quantizer = method.activation(activation_site(method, bits, relu)).eval()
        y = quantizer(x).detach()
        grid = quantizer.params
        assert grid.scale.ndim == 0
        assert torch.equal(quantizer.scale.detach(), grid.scale)
        assert torch.equal(dequantize(quantize(y, grid), grid), y)
        assert bool((y.diff() >= 0).all())
        assert torch.equal(quantizer(y), y)
        assert not relu or float(y.min()) == 0
        exact = dequantize(quantize(x, grid), grid)
        assert torch.equal(y, exact.clamp(min=0) if relu else exact)


def seen_by(quantizer: WeightQuantizer | ActivationQuantizer, x: Tensor) -> Tensor:
    y = quantizer(x)
    return y[0] if isinstance(y, tuple) else y


def quantizers_of(method: TrainingQuantizer) -> Iterator[tuple[nn.Module, Tensor]]:
    weight = random_weight()
    for bits in (method.min_bits, 4):
        yield method.weight(weight_site(method, weight, bits)), weight
    for relu in (False, True):
        yield method.activation(activation_site(method, 4, relu)), random_images()


def train(quantizer: Any, x: Tensor, steps: int = 3) -> Tensor:
    """Some steps of descent, for the input and for what the quantizer learns; the last gradient."""
    quantizer.train()
    value = x.clone().requires_grad_()
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([value, *learned], 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (seen_by(quantizer, value) * torch.linspace(-1, 1, x.shape[-1])).square().sum().backward()
        optimizer.step()
    for parameter in (value, *learned):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert torch.isfinite(parameter).all()
    return value.detach()


@every_method
def test_training_again_with_the_seed_gives_the_same_bytes(method: TrainingQuantizer) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append([(train(q, x), q.state_dict()) for q, x in quantizers_of(method)])
    for (x, state), (again, other) in zip(*runs, strict=True):
        assert torch.equal(x, again)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


@every_method
def test_state_brings_all_back_and_training_goes_on(method: TrainingQuantizer) -> None:
    for (trained, x), (fresh, _) in zip(quantizers_of(method), quantizers_of(method), strict=True):
        value = train(trained, x)
        fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
        torch.manual_seed(1)
        one = train(trained, value)
        torch.manual_seed(1)
        assert torch.equal(one, train(fresh, value))
        assert torch.equal(seen_by(trained.eval(), x), seen_by(fresh.eval(), x))  # type: ignore[arg-type]


@every_method
def test_evaluation_changes_nothing(method: TrainingQuantizer) -> None:
    for quantizer, x in quantizers_of(method):
        before = copy.deepcopy(quantizer.state_dict())
        seen_by(quantizer.eval(), x)  # type: ignore[arg-type]
        assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


# The papers' formulas, written again


def through(x: Tensor, y: Tensor) -> Tensor:
    return x + (y - x).detach()


def dorefa(w: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return through(w, torch.where(w >= 0, 1.0, -1.0) * w.abs().mean())
    t = torch.tanh(w)
    x = t / (2 * t.abs().max()) + 0.5
    n = 2**bits - 1
    return 2 * through(x, (x * n).round() / n) - 1


def dorefa_in_unit(w: Tensor, bits: int) -> Tensor:
    unit = 1.0 if bits == 1 else float(w.detach().abs().max())
    return unit * dorefa(w, bits)


def wrpn(w: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return dorefa(w, 1)
    unit, n = float(w.detach().abs().max()), 2 ** (bits - 1) - 1
    v = (w / unit).clamp(-1.001, 1.001)
    return unit * through(v, (v * n).round() / n)


def xnor(w: Tensor, bits: int) -> Tensor:
    alpha = w.abs().flatten(1).mean(1).detach().view(-1, 1, 1, 1)
    slope = 1 / w[0].numel() + (w.abs() <= 1) * alpha
    return through(w * slope.detach(), torch.where(w >= 0, alpha, -alpha))


def twn(w: Tensor, bits: int) -> Tensor:
    delta = 0.7 * w.abs().mean()
    return through(w, w.sign() * (w.abs() > delta) * w.abs()[w.abs() > delta].mean())


def binary(w: Tensor, bits: int) -> Tensor:
    unit = w.abs().mean().detach()
    return through(w, torch.where(w >= 0, unit, -unit))


FORMULAS = {
    "DorefaQuantizer": (dorefa_in_unit, range(1, 8)),
    "PACTQuantizer": (dorefa_in_unit, range(1, 8)),
    "WRPNQuantizer": (wrpn, range(1, 9)),
    "XNORQuantizer": (xnor, [1]),
    "TWNQuantizer": (twn, [2]),
    "BinaryConnectQuantizer": (binary, [1]),
    "BinaryNetQuantizer": (binary, [1]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_follow_the_formula_of_the_paper(name: str) -> None:
    formula, all_bits = FORMULAS[name]
    method = TRAINING_QUANTIZERS[name]()
    for bits in all_bits:
        values, slopes = [], []
        weight = random_weight(bits) * 4
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
        if formula in (binary, wrpn):  # these hold back only a descent that leads away from 0
            upstream = upstream.abs() * weight.sign()
        quantizer = method.weight(weight_site(method, weight, bits))
        for function in (lambda w: quantizer(w)[0], lambda w: formula(w, bits)):  # noqa: B023
            w = weight.clone().requires_grad_()
            y = function(w)
            (y * upstream).sum().backward()
            values.append(y.detach())
            slopes.append(w.grad)
        assert torch.allclose(values[0], values[1], atol=1e-6), bits
        assert torch.allclose(slopes[0], slopes[1], atol=1e-5, rtol=1e-4), bits


def test_dorefa_has_its_own_values() -> None:
    """2^n levels without 0, as in the paper; from 8 bits on, those of the symmetric grid."""
    weight = torch.linspace(-3, 3, 100_001).view(1, -1)
    method = TRAINING_QUANTIZERS["DorefaQuantizer"]()
    for bits in range(2, 8):
        rounded, _ = method.weight(weight_site(method, weight, bits))(weight)
        levels = rounded.unique()
        assert len(levels) == 2**bits
        assert torch.allclose(levels, torch.linspace(-3, 3, 2**bits), atol=1e-5)
    quantizer = method.weight(weight_site(method, weight, 8))
    assert quantizer.grid(weight).spec == QuantSpec.of_mode("sym_restr", 8)
    assert len(quantizer(weight)[0].unique()) == 255


def test_sign_of_zero_is_plus_one() -> None:
    for name in ("BinaryConnectQuantizer", "BinaryNetQuantizer", "XNORQuantizer", "DorefaQuantizer", "WRPNQuantizer"):
        method = TRAINING_QUANTIZERS[name]()
        weight = torch.tensor([[0.0, -0.0, -1.0, 1.0]])
        assert method.weight(weight_site(method, weight, 1))(weight)[0].tolist() == [[0.5, 0.5, -0.5, 0.5]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_and_its_gradients(bits: int) -> None:
    method = TRAINING_QUANTIZERS["PACTQuantizer"](act_clip_init_val=2.0)
    quantizer = method.activation(activation_site(method, bits, True))
    (top,) = quantizer.parameters()
    x = random_images().requires_grad_()
    upstream = random_images(1)
    y = quantizer(x)
    (y * upstream).sum().backward()
    a, n = 2.0, 2**bits - 1
    clipped = 0.5 * (x.abs() - (x - a).abs() + a)
    assert torch.allclose(y, (clipped * n / a).round() * a / n, atol=1e-6)
    assert x.grad is not None
    assert top.grad is not None
    assert torch.equal(x.grad, upstream * ((x >= 0) & (x < a)))
    assert top.grad.item() == pytest.approx((upstream * (x >= a)).sum().item(), rel=1e-4)


def test_a_top_that_became_negative_can_come_back() -> None:
    method = TRAINING_QUANTIZERS["PACTQuantizer"]()
    quantizer = method.activation(activation_site(method, 4, True))
    (top,) = quantizer.parameters()
    top.data.fill_(-0.5)
    quantizer(random_images()).sum().backward()
    assert top.grad is not None
    assert top.grad > 0
    assert quantizer.params.scale > 0


def test_dorefa_and_wrpn_clip_at_the_range_they_start_with() -> None:
    for name in ("DorefaQuantizer", "WRPNQuantizer", "BinaryNetQuantizer", "XNORQuantizer"):
        method = TRAINING_QUANTIZERS[name]()
        quantizer = method.activation(activation_site(method, 1, True))
        x = torch.tensor([[-1.0, 1.0, 2.0, 3.5]], requires_grad=True)
        y = quantizer(x)
        y.sum().backward()
        assert y.tolist() == [[0.0, 0.0, 3.0, 3.0]]
        assert x.grad is not None
        assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
        assert not any(p.requires_grad for p in quantizer.parameters())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), min_size=1, max_size=8), st.floats(0, 1))
def test_the_range_of_an_activation_is_a_corrected_moving_average(
    ranges: list[tuple[float, float]], decay: float
) -> None:
    start = qparams_from_range(-1.0, 2.0, QuantSpec.of_mode("asym_u", 8))
    quantizer = EmaActivation(ActivationSite(8, start, relu=False), decay)
    kept = [tuple(quantizer.range.tolist())]
    for low, width in ranges:
        batch = torch.tensor([low, low + width])
        quantizer(batch)
        kept.append(tuple(batch.tolist()))
    for end in (0, 1):
        ema = 0.0
        for seen in kept:
            ema = decay * ema + (1 - decay) * seen[end]
        plain = sum(seen[end] for seen in kept) / len(kept)
        expected = plain if decay > 1 - 1e-6 else ema / (1 - decay ** len(kept))
        assert quantizer.range[end].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    low, high = quantizer.range.tolist()
    assert quantizer.params.same_grid(qparams_from_range(low, max(low, high), quantizer.spec))


def test_inputs_have_their_own_bits() -> None:
    method = TRAINING_QUANTIZERS["QuantAwareTrainRangeLinearQuantizer"](num_bits_inputs=6)
    site = activation_site(method, 4, False)
    assert method.activation(site).params.spec.bits == 4
    assert method.activation(dataclasses.replace(site, input=True)).params.spec.bits == 6


def test_lsq_plus_learns_an_integer_zero_point() -> None:
    start = qparams_from_range(-1.0, 2.0, QuantSpec.of_mode("asym_u", 4))
    quantizer = LsqPlusActivation(start)
    assert quantizer.params.same_grid(start)
    x = (random_images() - 0.7).requires_grad_()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.05)
    errors = []
    for _ in range(200):
        optimizer.zero_grad()
        error = (quantizer(x) - x.detach()).square().mean() * 50
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]
    assert int(quantizer.params.zero_point) > int(start.zero_point)
    scale, offset = (value.item() for value in quantizer.state_dict().values())
    x.grad = None
    optimizer.zero_grad()
    upstream = random_images(3)
    (quantizer(x) * upstream).sum().backward()
    lowest = round(offset / scale)
    steps = x.detach() / scale
    below, above = steps < lowest - 0.5, steps > lowest + 15.5
    factor = 1 / math.sqrt(x[0].numel() * 15)
    of_scale = torch.where(below | above, 0.0, steps.round() - steps)  # below: the code 0
    of_scale = torch.where(above, torch.tensor(15.0), of_scale) + (below | above) * (lowest - offset / scale)
    assert quantizer.scale.grad is not None
    assert quantizer.offset.grad is not None
    assert quantizer.offset.grad.item() == pytest.approx((upstream * (below | above)).sum().item() * factor, rel=1e-3)
    assert quantizer.scale.grad.item() == pytest.approx((upstream * of_scale).sum().item() * factor, rel=1e-3)


# Rounding at random


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("QuantAwareTrainRangeLinearQuantizer", 3),
        ("DorefaQuantizer", 2),
        ("WRPNQuantizer", 3),
        ("LSQQuantizer", 3),
        ("BinaryConnectQuantizer", 1),
        ("LSQPlusQuantizer", 4),
        ("PACTQuantizer", 8),
    ],
)
def test_stochastic_rounding_has_the_right_mean_in_training_only(name: str, bits: int) -> None:
    torch.manual_seed(0)
    linear = name == "QuantAwareTrainRangeLinearQuantizer"
    method = TRAINING_QUANTIZERS[name](**({"mode_weights": "sym_restr"} if linear else {}))
    weight = random_weight()[:2, :2]
    plain = method.weight(weight_site(method, weight, bits)).eval()
    quantizer = method.weight(dataclasses.replace(weight_site(method, weight, bits), stochastic=True))
    assert torch.equal(quantizer.eval()(weight)[0], plain(weight)[0])
    quantizer.train()
    tries = torch.stack([quantizer(weight)[0] for _ in range(2000)])
    step = float(quantizer.grid(weight).scale) * (2 if name in ("DorefaQuantizer", "BinaryConnectQuantizer") else 1)
    value = quantizer.value(weight) if isinstance(quantizer, CodedWeight) else weight
    low, high = range_of_grid(quantizer.grid(weight))
    expected = value.clamp(float(low), float(high))
    assert (tries.mean(0) - expected).abs().max() < 0.06 * step
    assert ((tries - expected).abs() < step * 1.001).all()


def test_binary_connect_draws_with_a_hard_sigmoid() -> None:
    torch.manual_seed(0)
    quantizer = BinaryWeight(torch.tensor(1.0), stochastic=True)
    weight = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 1.5]])
    share = (torch.stack([quantizer(weight)[0] for _ in range(4000)]) > 0).float().mean(0)
    assert torch.allclose(share, ((weight + 1) / 2).clamp(0, 1), atol=0.03)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_dorefa_has_few_values_and_the_right_mean(bits: int) -> None:
    torch.manual_seed(0)
    upstream = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 100.0, 0.0]).view(-1, 1, 1, 1)
    seen = []
    for _ in range(1500):
        x = torch.zeros(3, 2, 4, 4, requires_grad=True)
        y = DorefaGradient(bits)(x)
        assert torch.equal(y, x)
        (y * upstream).sum().backward()
        assert x.grad is not None
        seen.append(x.grad)
    largest = upstream.abs().amax((1, 2, 3), keepdim=True)
    codes = (seen[0][:2] / (2 * largest[:2]) + 0.5) * (2**bits - 1)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert bool(((codes > -0.01) & (codes < 2**bits - 0.99)).all())
    assert bool((seen[0][2].abs() < 1e-30).all())
    step = 2 * largest / (2**bits - 1)
    assert bool(((torch.stack(seen).mean(0) - upstream).abs() <= 0.08 * step + 1e-30).all())


def test_only_dorefa_changes_gradients_and_only_if_asked() -> None:
    made = {IDS[index] for index, method in enumerate(METHODS) if method.gradient() is not None}
    assert made == {"Dorefa"}
    assert TRAINING_QUANTIZERS["DorefaQuantizer"]().gradient() is None


def test_weight_decay_of_what_is_learned() -> None:
    assert {m.weight_decay for m in METHODS if type(m).__name__ != "Pact"} == {0.0}
    assert TRAINING_QUANTIZERS["PACTQuantizer"](act_clip_decay=1e-4).weight_decay == 1e-4
    assert TRAINING_QUANTIZERS["PACTQuantizer"]().weight_decay == 0.0


# Exact when deployed


class Tiny(nn.Module):
    """A residual net; batch-norms as training leaves them, some with negative factors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 9, 10)
        for norm in (self.bn0, self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            norm.weight.data[::3] *= -1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = F.relu(self.bn1(self.conv(x)))
        x = F.relu(self.bn2(self.depthwise(y)) + x)
        return self.fc(F.avg_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


def attach(layer: TrainableLayer, name: str, plan: Plan, method: TrainingQuantizer, bits: tuple[int, int]) -> None:
    """The quantizers that a layer has in its plan."""
    planned, relu = plan.layers[name], layer.activation is not None

    def activation(tensor: TensorPlan | None, after_relu: bool, image: bool) -> ActivationQuantizer | None:
        if tensor is None:
            return None
        return method.activation(ActivationSite(bits[0], tensor.qparams(), after_relu, image))

    layer.output = activation(planned.output, relu, False)
    for index, tensor in enumerate(planned.inputs):
        layer.inputs[index] = activation(tensor, False, True) or nn.Identity()
    if planned.weight is not None:
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        layer.weight = method.weight(weight_site(method, weight.detach(), bits[1], planned.weight.per_channel))
        if layer.weight.folds and (gain := layer.gain()) is not None:
            folded = weight.detach() * gain.view(-1, 1, 1, 1)
            layer.weight = method.weight(weight_site(method, folded, bits[1], planned.weight.per_channel))
        layer.gradient = method.gradient()


@pytest.mark.parametrize("acts", [4, 8, 1])
@every_method
def test_what_trains_is_what_is_deployed(method: TrainingQuantizer, acts: int) -> None:
    if acts == 1 and method.planning["mode_activations"] != "asym_u":
        pytest.skip("one bit is unsigned")
    torch.manual_seed(0)
    wts = method.min_bits if acts < 8 else 4
    model, images, labels = Tiny(), torch.randn(256, 3, 6, 6), torch.randint(10, (256,))
    model.train()(images)
    graph = capture(model.eval(), images[:2])
    folded = copy.deepcopy(graph)
    names = fold_batch_norm(folded)
    chosen = {"mode_activations": "asym_u", **method.planning, "clip_acts": "none"}
    defaults = LayerSettings(bits_activations=acts, bits_weights=max(wts, 2), per_channel_wts=True)
    defaults = dataclasses.replace(defaults, **chosen)
    collector = Collector(folded)
    collector.update(images)
    layer_settings = resolve(PtqConfig(defaults), layer_infos(folded))
    plan = plan_post_train_linear(folded, layer_settings, ModelStats(collector.result()), names)

    trainable = prepare_qat(graph)
    for name, layer in trainable_layers(trainable):
        attach(layer, name, plan, method, (acts, wts))
    connect(trainable)
    optimizer = torch.optim.SGD(trainable.parameters(), 0.01, momentum=0.9)
    for start in range(0, 256, 64):
        optimizer.zero_grad()
        batch = slice(start, start + 64)
        F.cross_entropy(trainable.train()(images[batch]), labels[batch]).backward()
        optimizer.step()

    with torch.no_grad():
        trained = trainable.eval()(images)
        exact = lower(*convert(graph, trainable, plan))(images)
    assert torch.isfinite(exact).all()
    same = (trained - exact).abs() <= 1e-4 * trained.abs().max()
    assert same.float().mean() > 0.97, same.float().mean()
    assert (trained.argmax(1) == exact.argmax(1)).float().mean() >= 0.99


def test_one_bit_is_unsigned() -> None:
    spec = QuantSpec.of_mode("asym_u", 1)
    assert (spec.qmin, spec.qmax) == (0, 1)
    params = qparams_from_range(0.0, 2.0, spec)
    assert isinstance(params, QParams)
    assert dequantize(quantize(torch.tensor([-1.0, 0.9, 1.1, 7.0]), params), params).tolist() == [0.0, 0.0, 2.0, 2.0]
    for mode in ("sym", "sym_restr", "asym_s"):
        with pytest.raises(AssertionError):
            QuantSpec.of_mode(mode, 1)


# Wider layers


def test_a_wider_model_has_the_ends_of_the_old_one() -> None:
    torch.manual_seed(0)
    model, images = Tiny(), torch.randn(2, 3, 6, 6)
    torch.manual_seed(3)
    wide = widened(model, 2, images)
    torch.manual_seed(3)
    again = widened(model, 2, images)
    assert wide.training
    shapes = {name: tuple(value.shape) for name, value in wide.named_parameters()}
    assert shapes["stem.weight"] == (16, 3, 3, 3)
    assert shapes["conv.weight"] == (16, 16, 3, 3)
    assert shapes["depthwise.weight"] == (16, 1, 3, 3)
    assert shapes["bn1.weight"] == (16,)
    assert shapes["fc.weight"] == (10, 144)
    for value, other in zip(wide.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert wide(images).shape == (2, 10)
    assert model.fc.in_features == 72  # the old one stays
    assert bool((wide.get_submodule("bn0").weight == 1).all())


class HardCoded(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)) + torch.ones(8, 1, 1)
        return self.fc(F.avg_pool2d(x, 2).reshape(-1, 72))  # type: ignore[no-any-return]


def test_a_model_that_relies_on_its_widths_is_refused() -> None:
    images = torch.randn(2, 3, 6, 6)
    with pytest.raises(ModelError, match=r"cannot be widened by 2: .*takes no part in evaluation"):
        widened(HardCoded(), 2, images)
    model = HardCoded()
    del model.conv, model.bn1, model.depthwise, model.bn2
    with pytest.raises(ModelError, match="cannot be widened by 2: its own code relies on its widths; use widen: 1"):
        widened(model, 2, images)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_and_transposed_layers_are_widened(groups: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups),
        nn.Conv2d(6, 8, 1, groups=groups, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    )
    images = torch.randn(1, 3, 2, 2)
    wide = widened(model, 3, images)
    assert wide(images).shape == model(images).shape
    assert [tuple(p.shape[:2]) for p in wide.parameters() if p.ndim > 1] == [
        (12, 3),
        (12, 18 // groups),
        (24, 18 // groups),
        (5, 24),
    ]
