"""The fake lowering against the exact one, and its gradients."""

from __future__ import annotations

import pytest
import torch
from planned import planned
from torch import Tensor

from qlib.lower import lower
from qlib.lower.fake import FakeLayer, fake_quantize, lower_fake

CASES = [
    ("digits_cnn", 8, 8, "asym_u"),
    ("digits_cnn", 4, 4, "sym"),
    ("resnet20_cifar", 8, 8, "asym_u"),
    ("resnet20_cifar", 0, 4, "sym"),
    ("squeezenet1_1", 8, 8, "asym_s"),
    ("mobilenet_v2", 8, 8, "asym_u"),
]


@pytest.mark.parametrize(("arch", "acts", "wts", "mode"), CASES)
def test_fake_computes_what_exact_computes(arch: str, acts: int, wts: int, mode: str) -> None:
    """Up to the few codes that float32 rounds the other way, and what follows from them."""
    graph, plan, images = planned(arch, acts, wts, mode)
    with torch.inference_mode():
        exact, fake, reference = (model(images) for model in (lower(graph, plan), lower_fake(graph, plan), graph))
    assert (fake - exact).abs().mean() < 0.35 * (exact - reference).abs().mean() + 1e-5


def test_names_stay_and_layers_without_a_plan_are_not_touched() -> None:
    graph, plan, _ = planned("digits_cnn", 0, 0, "sym")
    fake = lower_fake(graph, plan)
    assert [node.name for node in fake.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert not any(isinstance(module, FakeLayer) for module in fake.modules())


def _plain(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    steps = x / scale
    return torch.clamp(steps + (steps.round() - steps).detach(), low, high) * scale


@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (0.0, 15.0), (-3.0, 12.0)])
def test_gradients_are_those_of_the_straight_through_formula(bounds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 1000, generator=generator) * 2.5).requires_grad_()
    scale = torch.tensor([[0.1], [0.3], [0.7], [2.0]], requires_grad=True)
    weights = torch.randn(4, 1000, generator=generator)
    grads = []
    for function in (fake_quantize, _plain):
        y = function(x, scale, *bounds)
        grads.append((y, *torch.autograd.grad((y * weights).sum(), (x, scale))))
    (y, of_x, of_scale), (plain_y, plain_x, plain_scale) = grads
    assert torch.allclose(y, plain_y, atol=1e-6)
    inner = (y > scale * bounds[0]) & (y < scale * bounds[1])  # at the bounds the sum of the plain formula may round up
    assert torch.allclose(of_x[inner], plain_x[inner])
    beyond = (x < scale * (bounds[0] - 0.51)) | (x > scale * (bounds[1] + 0.51))
    assert not of_x[beyond].any()
    assert not plain_x[beyond].any()
    slack = (weights.abs() * ~inner * ~beyond).sum(1, keepdim=True) * (max(map(abs, bounds)) + 1)
    assert bool(((of_scale - plain_scale).abs() <= slack + 1e-2).all())


def test_dropped_elements_stay_as_they_are() -> None:
    x = torch.tensor([0.3, 0.3], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = fake_quantize(x, scale, 0.0, 15.0, torch.tensor([True, False]))
    y.sum().backward()
    assert y.tolist() == [pytest.approx(0.3), 0.0]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0]
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(-0.3)
