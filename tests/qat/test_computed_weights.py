"""Weights that a model computes from its parameters: under quantizers they train through their formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from qlib.config.schedule.types import Component, PolicySpec
from qlib.graph import capture, deployed_copy, fold, lay_out
from qlib.graph.ir import parameters_of
from qlib.lower import lower
from qlib.lower.trainable import prepare_qat
from qlib.qat.quantization import Quantization
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

CLASSES = torch.arange(16) % 5
COLOURS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0], [0, 2, 2]])
NOISE = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = NOISE + COLOURS[CLASSES][:, :, None, None]


class Standardized(nn.Conv2d):
    """Weight standardization as its authors write it, with views of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = weight.view(len(weight), -1).std(1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / std, self.bias, self.stride, self.padding)


class StraightThrough(nn.Conv2d):
    """A weight on a grid of the model's own; the gradient passes the rounding by."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.round(self.weight * 8) / 8
        return F.conv2d(x, self.weight + rounded.detach() - self.weight.detach(), self.bias)


class ComputedBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat([self.bias[:4], torch.zeros(4)]))


class WrittenBias(nn.Linear):
    """A bias of which a part is set to zero, and scaled by what a small network makes of a table, as in Swin v2."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.table = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.clone()
        bias[2:4].zero_()
        return F.linear(x, self.weight, bias * self.table(torch.ones(2)).sigmoid())


class Scales(nn.Module):
    """Parameters that are operands: as they are, computed from, and of an op that has no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.slope = nn.Parameter(torch.linspace(0.5, 1.5, 8)), nn.Parameter(torch.full((8,), 0.2))
        self.shift, self.temperature = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.prelu(x * self.scale.view(1, -1, 1, 1).exp() + self.shift, self.slope)
        return x / (1 + self.temperature)


class Reused(nn.Module):
    """The weight of a convolution as that of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.linear(x.mean((2, 3)), self.conv.weight.view(8, 3))[:, :, None, None]


def net(first: nn.Module, *more: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(
        first, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), *more, nn.Linear(8, 5)
    )


MODELS = [
    pytest.param(lambda: net(Standardized(3, 8, 3, padding=1)), id="weight standardization"),
    pytest.param(lambda: net(weight_norm(nn.Conv2d(3, 8, 3))), id="weight norm"),
    pytest.param(lambda: net(spectral_norm(nn.Conv2d(3, 8, 3))), id="spectral norm"),
    pytest.param(lambda: net(StraightThrough(3, 8, 3)), id="straight-through estimator"),
    pytest.param(lambda: net(nn.Conv2d(3, 8, 3), ComputedBias(8, 8)), id="computed bias"),
    pytest.param(lambda: net(nn.Conv2d(3, 8, 3), WrittenBias()), id="writes in place"),
    pytest.param(lambda: net(nn.Sequential(nn.Conv2d(3, 8, 3), Scales())), id="operands"),
    pytest.param(lambda: net(Reused()), id="one weight of two layers"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gradients(model: nn.Module, computing: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    F.cross_entropy(computing(IMAGES), CLASSES).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_those_of_the_model(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    names = list(model.state_dict())
    trained = prepare_qat(lay_out(capture(lay_out(model), IMAGES[:2], share=True)))
    torch.testing.assert_close(gradients(model, trained), gradients(model, model))
    assert list(model.state_dict()) == names
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
        torch.testing.assert_close(trained(IMAGES), model(IMAGES))


@pytest.mark.parametrize("make", MODELS)
def test_what_is_deployed_holds_constants_and_what_trains_goes_on(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    graph = capture(model, IMAGES[:2], share=True)
    deployed = deployed_copy(graph)
    with torch.no_grad():
        before = model(IMAGES)
        torch.testing.assert_close(deployed(IMAGES), before)
        for parameter in model.parameters():
            parameter *= 1.1
        torch.testing.assert_close(deployed(IMAGES), before)
        torch.testing.assert_close(graph(IMAGES), model(IMAGES))
    assert set(map(id, model.parameters())) <= set(map(id, parameters_of(graph)))
    assert not set(map(id, model.parameters())) & set(map(id, deployed.parameters()))


def quantization(model: nn.Module) -> Quantization:
    def calibrate(graph: nn.Module, count: int) -> ModelStats:
        collector = Collector(graph, histograms=True)  # type: ignore[arg-type]
        collector.update(IMAGES[:count])
        return ModelStats(collector.result(), {})

    settings = {"bits_activations": 8, "bits_weights": 8, "edges": "all"}
    component = Component("quantizers", "LSQQuantizer", "LSQQuantizer", settings, (), "a.yaml:2")
    folded = fold(model, IMAGES[:2])
    return Quantization(capture(model, IMAGES[:2], share=True), folded, [PolicySpec(component, 0, 1)], calibrate)


@pytest.mark.parametrize("make", MODELS)
def test_under_a_quantizer_they_train_and_the_integers_follow(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.named_parameters()}
    work = quantization(model)
    assert {id(each) for each in work.weights} >= {id(each) for each in model.parameters()}
    optimizer = torch.optim.Adam(work.weights, 0.01)
    work.on_epoch_begin(0)
    losses = []
    for _ in range(20):
        work.module.train()
        loss = F.cross_entropy(work.module(IMAGES), CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    work.module.eval()
    assert losses[-1] < 0.9 * losses[0]
    unmoved = {name for name, value in model.named_parameters() if torch.equal(before[name], value)}
    assert not unmoved
    learned = work.convert()
    assert learned is not None
    with torch.no_grad():
        exact, fake = lower(*learned)(IMAGES), work.module(IMAGES)
    assert torch.equal(exact.argmax(1), fake.argmax(1))
    step = learned[1].layers[next(reversed(learned[1].layers))].output
    assert step is not None
    assert float((exact - fake).abs().max()) <= 1.01 * float(step.qparams().scale)
