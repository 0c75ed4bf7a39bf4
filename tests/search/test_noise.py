"""The noise of each output where all layers before it are quantized, held to what the exact lowering computes."""

from __future__ import annotations

import pytest
import torch
from planned import planned

from qlib.lower import exact_arithmetic, lower
from qlib.search.noise import cumulated_sqnr
from qlib.search.sensitivity import sqnr


@pytest.mark.parametrize("arch", ["digits_cnn", "resnet20_cifar", "vgg11_cifar", "squeezenet1_0"])
def test_noise_of_the_logits_is_that_of_the_lowered_model(arch: str) -> None:
    graph, plan, images = planned(arch, acts=6, wts=5)
    found = cumulated_sqnr(graph, plan, images)
    with exact_arithmetic(), torch.inference_mode():
        exact, rounded = graph(images), lower(graph, plan)(images)
    expected = sqnr(float(exact.square().sum()), float((rounded - exact).square().sum()))
    assert list(found.values())[-1] == pytest.approx(expected, abs=1.0)  # a flip of one code changes a few logits
    assert all(0 < each < 60 for each in found.values())


def test_the_first_layer_has_its_own_noise_alone() -> None:
    graph, plan, images = planned("digits_cnn", acts=8, wts=8)
    few = cumulated_sqnr(*planned("digits_cnn", acts=8, wts=3)[:2], images)
    many = cumulated_sqnr(graph, plan, images)
    assert all(many[name] > few[name] + 10 for name in many)
