"""Corrections of what rounding does to channels: biases, gains."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.correct._base import CalibrationImages
from qlib.correct._walk import channel_moments
from qlib.correct.bias_correction import analytic_bias_correction, bias_correction
from qlib.correct.bn_reestimation import bn_reestimation
from qlib.graph import (
    Graph,
    NormStatistics,
    after_folding,
    capture,
    fold_batch_norm,
    fused_activations,
    norm_statistics,
)
from qlib.graph.ir import name_of
from qlib.lower.fake import FakeLayer, lower_fake
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).abs()


class Small(nn.Module):
    """Convolutions with and without bias, a depthwise one, an addition, a transposed one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.up(self.relu(self.depthwise(x) + x))
        out: Tensor = self.fc(self.pool(x).flatten(1))
        return out


def prepared(model: nn.Module | None = None) -> tuple[Graph, dict[str, NormStatistics], dict[str, str]]:
    torch.manual_seed(0)
    model = model or Small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.momentum = None
    with torch.no_grad():
        model.train()(IMAGES)
    graph = capture(model, IMAGES[:2])
    norms = norm_statistics(graph)
    folded = fold_batch_norm(graph)
    return graph, after_folding(norms, folded), folded


def plan_for(graph: Graph, bits: int, *, per_channel: bool = False, scale: str = "float") -> Plan:
    collector = Collector(graph)
    collector.update(IMAGES)
    each = LayerSettings(
        bits_activations=8, bits_weights=bits, mode_activations="asym_u", mode_weights="asym_s",
        per_channel_wts=per_channel, scale=scale,
    )  # fmt: skip
    return plan_post_train_linear(
        graph, resolve(PtqConfig(each, ()), layer_infos(graph)), ModelStats(collector.result())
    )


def calibration(folder: Path) -> CalibrationImages:
    return CalibrationImages(lambda: iter(IMAGES.split(16)), len(IMAGES), torch.device("cpu"), folder)


def outputs(graph: Graph, plan: Plan | None, images: Tensor = IMAGES) -> dict[str, Tensor]:
    """What each weighted layer computes before its grid, by one plain pass with hooks."""
    model = graph if plan is None else lower_fake(graph, plan)
    found: dict[str, Tensor] = {}
    handles = []
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeLayer):
            module, name = module.module, str(node.meta["name"])
        else:
            name = str(node.meta["name"])
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            handles.append(module.register_forward_hook(lambda m, x, y, name=name: found.update({name: y})))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def channels(y: Tensor) -> Tensor:
    return (y if y.ndim == 2 else y.movedim(1, -1).flatten(0, -2)).double()


def half_bias_step(graph: Graph, plan: Plan, name: str) -> Tensor:
    """How far from its value a bias may be: it is rounded too."""
    layer = fakes(graph, plan)[name]
    (source,) = layer.source
    return source.scale * layer.weight.params.scale / 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99), st.floats(-100, 100))
def test_moments_of_batches_are_those_of_the_whole(sizes: list[int], seed: int, offset: float) -> None:
    torch.manual_seed(seed)
    batches = [torch.randn(n, 3, 2, 2) + offset for n in sizes]
    found = channel_moments(nn.Conv2d(1, 3, 1), batches)
    whole = channels(torch.cat(batches))
    torch.testing.assert_close(found.mean, whole.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std, whole.std(0, unbiased=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given_reference", [False, True])
def test_corrected_means_are_those_of_the_float_model(tmp_path: Path, given_reference: bool) -> None:
    graph, _, _ = prepared()
    activated = {name_of(node) for node in fused_activations(graph)}
    before = outputs(graph, None)
    plan = plan_for(graph, 3)
    wrong = outputs(graph, plan)
    reference = copy.deepcopy(graph) if given_reference else None
    (line,) = bias_correction(graph, plan, calibration(tmp_path), reference)
    assert line.startswith("Bias correction: 4 layers; means of channels were off by")
    after = outputs(graph, plan)
    for name, y in before.items():
        std, exact = channels(y).std(0), channels(y)
        assert ((channels(wrong[name]) - exact).mean(0).abs() / std).max() > 0.02
        seen = exact > 0 if name in activated else torch.ones_like(exact, dtype=torch.bool)
        shift = ((channels(after[name]) - exact) * seen).sum(0) / seen.sum(0).clamp(min=1)
        assert ((shift.abs() - half_bias_step(graph, plan, name)) / std).max() < 0.01, name


def test_a_layer_without_bias_gets_one(tmp_path: Path) -> None:
    graph, _, _ = prepared()
    plan = plan_for(graph, 3)
    assert graph.get_submodule("up").bias is None
    bias_correction(graph, plan, calibration(tmp_path))
    assert graph.get_submodule("up").bias.shape == (8,)


@pytest.mark.parametrize("per_channel", [False, True])
def test_reestimation_matches_mean_and_deviation(tmp_path: Path, per_channel: bool) -> None:
    graph, _, _ = prepared()
    before, plan = outputs(graph, None), plan_for(graph, 3, per_channel=per_channel)
    codes = {name: layer.weight.params for name, layer in fakes(graph, plan).items()}
    was = {name: layer.weight(layer.module.weight) for name, layer in fakes(graph, plan).items()}
    new = bn_reestimation(graph, plan, calibration(tmp_path))
    after, layers = outputs(graph, new), fakes(graph, new)
    for name, y in before.items():
        mean, std = channels(y).mean(0), channels(y).std(0)
        left = (channels(after[name]).mean(0) - mean).abs() - half_bias_step(graph, new, name)
        assert (left / std).max() < 0.01, name
        if per_channel:
            torch.testing.assert_close(channels(after[name]).std(0), std, rtol=1e-2, atol=0)
        gain = layers[name].weight.params.scale / codes[name].scale
        swap = layers[name].weight.swap
        now = layers[name].weight(layers[name].module.weight)
        expected = swap(was[name]) * gain.view(-1, *[1] * (now.ndim - 1))
        torch.testing.assert_close(swap(now), expected, rtol=1e-5, atol=1e-6)  # the codes stay
        assert torch.equal(layers[name].weight.params.zero_point, codes[name].zero_point)
        assert bool((gain != 1).any()) == per_channel


def fakes(graph: Graph, plan: Plan) -> dict[str, FakeLayer]:
    model = lower_fake(graph, plan)
    layers = {
        str(n.meta["name"]): model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module"
    }
    return {name: each for name, each in layers.items() if isinstance(each, FakeLayer) and each.weight is not None}


def test_powers_of_two_stay_powers_of_two(tmp_path: Path) -> None:
    graph, _, _ = prepared()
    plan = plan_for(graph, 3, per_channel=True, scale="pow2")
    new = bn_reestimation(graph, plan, calibration(tmp_path))
    for layer in fakes(graph, new).values():
        assert bool((layer.weight.params.scale.frexp().mantissa == 0.5).all())


def test_the_analytic_correction_is_that_of_normal_inputs() -> None:
    """A reference by numbers: normal values, cut, through both weights."""
    graph, norms, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 5, 1)))
    norms["0"] = NormStatistics(torch.tensor([1.0, -2.0, 5.0, 0.0]), torch.tensor([1.0, 1.0, 3.0, 1e-9]))
    plan = plan_for(graph, 2)
    last = graph.get_submodule("3")
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    lines = analytic_bias_correction(graph, plan, norms)
    assert lines[1] == "Not corrected, as no batch-norm tells the mean of their input: 0"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200_000, 4, generator=generator, dtype=torch.float64) * norms["0"].std + norms["0"].mean
    rounded = fakes(graph, plan)["3"].weight(weight)
    expected = (rounded - weight).flatten(1).double() @ x.clamp(0, 6).mean(0)
    torch.testing.assert_close((bias - last.bias).double(), expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0.05


def test_the_analytic_correction_counts_the_taps_at_the_border() -> None:
    graph, norms, _ = prepared(nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)))
    norms["0"] = NormStatistics(torch.tensor([1.0]), torch.tensor([0.0]))
    plan = plan_for(graph, 2)
    last = graph.get_submodule("2")
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    analytic_bias_correction(graph, plan, norms)
    error = fakes(graph, plan)["2"].weight(weight) - weight
    image = torch.conv2d(torch.ones(1, 1, 8, 8), error, padding=1)
    torch.testing.assert_close(bias - last.bias, image.mean().view(1))
    assert not math.isclose(float(image.mean()), float(error.sum()), rel_tol=1e-3)


def test_after_equal_weights_nothing_is_corrected(tmp_path: Path) -> None:
    graph, norms, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)))
    plan = plan_for(graph, 16)
    bias = graph.get_submodule("3").bias.detach().clone()
    analytic_bias_correction(graph, plan, norms)
    torch.testing.assert_close(graph.get_submodule("3").bias.detach(), bias, rtol=0, atol=1e-4)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.a(x)))
        return out


def test_a_layer_that_is_called_twice_is_named_and_stays(tmp_path: Path) -> None:
    graph, norms, _ = prepared(Twice())
    bias = graph.get_submodule("a").bias.detach().clone()
    plan = plan_for(graph, 3)
    line = "Not corrected, as they are called, or their weights used, more than once: a, a_1"
    assert line in bias_correction(graph, plan, calibration(tmp_path))
    assert line in analytic_bias_correction(graph, plan, norms)
    bn_reestimation(graph, plan, calibration(tmp_path))
    assert torch.equal(graph.get_submodule("a").bias, bias)
