"""What batch-norms know: statistics kept by folding, moments of every tensor, statistics without images."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import (
    SwinTransformer,
    densenet121,
    mobilenet_v2,
    mobilenet_v3_small,
    resnet18,
    shufflenet_v2_x0_5,
    squeezenet1_1,
)

from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.errors import StatsError
from qlib.graph import Graph, NormStatistics, after_folding, capture, fold_batch_norm, norm_statistics
from qlib.graph.ir import name_of
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.data_free import data_free_stats
from qlib.stats.moments import clipped_normal, propagate

COLORS = (torch.full((3,), -1.0), torch.full((3,), 1.0))


def folded(model: nn.Module, images: Tensor, *, settle: bool = False) -> tuple[Graph, dict[str, NormStatistics]]:
    """The folded graph and its statistics; `settle` lets the batch-norms measure these images first."""
    if settle:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            model.train()(images)
    graph = capture(model, images[:2])
    norms = norm_statistics(graph)
    return graph, after_folding(norms, fold_batch_norm(graph))


def test_statistics_are_those_of_the_output_that_the_norm_gives() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    nn.init.normal_(cast(nn.BatchNorm2d, model[1]).weight)
    nn.init.normal_(cast(nn.BatchNorm2d, model[1]).bias)
    cast(nn.Conv2d, model[0]).weight.data[0] *= 1e-4  # hardly varies: epsilon takes most of its deviation
    graph, norms = folded(model, images, settle=True)
    assert list(norms) == ["0"]
    y = graph.get_submodule("0")(images).detach().movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close(norms["0"].mean, y.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(norms["0"].std, y.std(0), rtol=1e-2, atol=1e-5)


def test_a_norm_that_is_not_absorbed_tells_of_its_input_too() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1))
    graph, norms = folded(model, images, settle=True)
    assert set(norms) == {"1", "2"}
    y = graph.get_submodule("0")(images).relu().detach().movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close(norms["1"].mean, y.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms["1"].std, y.std(0), rtol=1e-2, atol=0)
    torch.testing.assert_close(norms["2"].std, torch.ones(5).double(), rtol=1e-3, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.floats(-8, 8), st.floats(0.01, 4), st.sampled_from([math.inf, 6.0]))
def test_moments_of_a_cut_normal_against_numbers(mean: float, std: float, high: float) -> None:
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight /= weight.sum()
    y = (mean + std * z).clamp(0.0, high)
    expected = float((y * weight).sum())
    variance = float(((y - expected).square() * weight).sum())
    found = clipped_normal(torch.tensor(mean).double(), torch.tensor(std**2).double(), 0.0, high)
    assert float(found[0]) == pytest.approx(expected, abs=1e-6)
    assert float(found[1]) == pytest.approx(variance, abs=1e-6)


def test_a_channel_that_does_not_vary() -> None:
    mean, variance = clipped_normal(torch.tensor([2.0, -3.0, 9.0]), torch.zeros(3), 0.0, 6.0)
    assert mean.tolist() == [2.0, 0.0, 6.0]
    assert variance.tolist() == [0.0, 0.0, 0.0]


class Mixed(nn.Module):
    """Two normed layers that meet in an addition and a concatenation, then pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.silu, self.pool, self.fc = nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        x = torch.cat([a + b, self.silu(b)], 1)
        out: Tensor = self.fc(self.pool(x).flatten(1))
        return out


def test_moments_follow_the_graph() -> None:
    torch.manual_seed(0)
    graph, norms = folded(Mixed(), torch.randn(2, 3, 8, 8))
    found = {name_of(node): moments for node, moments in propagate(graph, norms, None).items()}
    half = 1 / math.sqrt(2 * math.pi)
    assert bool(found["x"].mean.isnan().all())
    assert found["a.2"].mean.mean().item() == pytest.approx(half, rel=1e-4)
    assert found["add"].mean.mean().item() == pytest.approx(half, rel=1e-4)
    assert found["add"].variance.mean().item() == pytest.approx(1.5 - half**2, rel=1e-4)
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    silu = nn.functional.silu(z)
    assert found["silu"].mean.mean().item() == pytest.approx(silu.mean().item(), abs=5e-3)
    assert found["silu"].variance.mean().item() == pytest.approx(silu.var().item(), abs=5e-3)
    assert found["silu"].low.min().item() == pytest.approx(-0.278, abs=0.01)
    fc = graph.get_submodule("fc")
    pooled = torch.cat([torch.full((4,), half), silu.mean().expand(4)])
    torch.testing.assert_close(found["fc"].mean[0], fc(pooled).detach(), rtol=0, atol=5e-3)


NETWORKS = {
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": mobilenet_v3_small,
    "resnet18": resnet18,
    "shufflenet_v2_x0_5": shufflenet_v2_x0_5,
    "densenet121": densenet121,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_batch_norms_gets_a_plan_without_images(name: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    graph, norms = folded(NETWORKS[name](num_classes=10), images, settle=True)
    stats = data_free_stats(graph, norms, COLORS)
    plan = plan_post_train_linear(graph, resolve(PtqConfig(LayerSettings(), ()), layer_infos(graph)), stats)
    assert list(plan.layers) == list(stats.layers)
    collector = Collector(graph)
    collector.update(images)
    for layer, seen in collector.result().items():
        free = stats.layers[layer].output
        assert len(stats.layers[layer].inputs) == len(seen.inputs)
        assert free.shape[1:] == seen.output.shape[1:]
        if layer in norms:
            assert free.mean == pytest.approx(seen.output.mean, abs=0.2 * free.std + 1e-3)
            assert free.std == pytest.approx(seen.output.std, rel=0.35, abs=1e-3)
            assert free.b == pytest.approx(seen.output.b, rel=0.4, abs=1e-3)


def test_ranges_are_six_deviations_around_beta() -> None:
    graph, norms = folded(Mixed(), torch.randn(2, 3, 8, 8))
    norms["a.0"] = NormStatistics(torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.5, 2.0]))
    stats = data_free_stats(graph, norms, COLORS).layers
    assert (stats["a.0"].output.min, stats["a.0"].output.max) == (-12.0, 12.0)
    assert (stats["a.2"].output.min, stats["a.2"].output.max) == (0.0, 12.0)
    assert (stats["a.0"].inputs[0].min, stats["a.0"].inputs[0].max) == (-1.0, 1.0)
    assert stats["a.0"].output.avg_min is None


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        pytest.param(lambda: squeezenet1_1(num_classes=10), "features.0", id="no batch-norm at all"),
        pytest.param(
            lambda: SwinTransformer([4, 4], 8, [2], [2], [7, 7], num_classes=5), "features.0.0", id="a transformer"
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4)), "1", id="a linear layer of the image"
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), "2", id="one without"
        ),
    ],
)
def test_a_layer_that_nothing_is_known_of_is_named(model: object, layer: str) -> None:
    assert callable(model)
    graph, norms = folded(model(), torch.randn(2, 3, 64, 64))
    with pytest.raises(StatsError, match=f"layer '{layer}' has no batch-norm that tells its range.*--ptq-data-free"):
        data_free_stats(graph, norms, COLORS)
