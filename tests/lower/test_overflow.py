"""Biases and accumulators that int32 would not hold: scales are raised, and ONNX Runtime computes the same integers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.config.layers.settings import LayerSettings
from qlib.config.schedule.types import Component, PolicySpec
from qlib.correct._base import CORRECTIONS, CalibrationImages, call
from qlib.deploy.export import export_quantized
from qlib.deploy.session import open_session, run_session
from qlib.graph import Graph, after_folding, capture, fold, norm_statistics
from qlib.lower import lower
from qlib.lower.ops.weighted import ExactWeighted
from qlib.lower.overflow import ROOM, fit_int32
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.qat.quantization import Quantization
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), (4, 4, 4)),
    "linear": (lambda: nn.Linear(8, 6), (8,)),
}


def damaged(kind: str, dead: float, size: float, bias: float, seed: int) -> tuple[nn.Module, Tensor]:
    """A layer with two dead output channels and a large bias, and images of any size."""
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(seed)
    layer = make()
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.rand(value.shape, generator=generator) - 0.5)
        out = layer.weight.transpose(0, 1) if kind == "transposed" else layer.weight
        out[:2] *= dead
        layer.bias *= bias
    images = (torch.rand((4, *shape), generator=generator) - 0.3) * size
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Identity()).eval(), images


def planned(model: nn.Module, images: Tensor, **options: object) -> tuple[Graph, Plan]:
    """Graph and plan, before scales are raised."""
    graph = capture(model, images[:2])
    chosen = LayerSettings(**options)  # type: ignore[arg-type]
    each = {info.name: chosen for info in layer_infos(graph)}
    return graph, plan_post_train_linear(graph, each, statistics(graph, images), {})


def statistics(graph: Graph, images: Tensor) -> ModelStats:
    collector = Collector(graph, histograms=True)
    collector.update(images)
    return ModelStats(collector.result())


def weighted(model: nn.Module) -> list[ExactWeighted]:
    return [module for module in model.modules() if isinstance(module, ExactWeighted)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    dead=st.sampled_from([1.0, 1e-6, 1e-11, 1e-20, 1e-37, 0.0]),
    size=st.sampled_from([1.0, 1e-6, 1e4]),
    bias=st.sampled_from([0.0, 1.0, 1e4]),
    mode=st.sampled_from(["sym", "asym_u", "sym_restr"]),
    per_channel=st.booleans(),
    bits=st.sampled_from([8, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_exact_and_onnx_runtime_agree_on_dead_channels(
    kind: str, dead: float, size: float, bias: float, mode: str, per_channel: bool, bits: int, seed: int
) -> None:
    model, images = damaged(kind, dead, size, bias, seed)
    graph, plan = planned(
        model, images, mode_activations="asym_u", mode_weights=mode, per_channel_wts=per_channel, bits_weights=bits
    )
    assert_fits(graph, plan, images)


def assert_fits(graph: Graph, plan: Plan, images: Tensor) -> None:
    """Raises the scales of a plan; then no bias saturates, and ONNX Runtime computes what the exact lowering does."""
    plan, _ = fit_int32(graph, plan)
    exact = lower(graph, plan)
    for layer in weighted(exact):
        assert layer.bias_codes is not None
        assert layer.bias_codes.abs().max() <= 1.01 * ROOM
    with TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        export_quantized(exact, images[:2], path, opset=21, metadata={"version": "test"})
        (found,) = run_session(open_session(path), images)
        assert torch.equal(found, exact(images))
    assert fit_int32(graph, plan) == (plan, {})


@pytest.mark.parametrize(
    ("kind", "correction"),
    [
        ("conv", "gptq"),
        ("linear", "gptq"),
        ("transposed", "adaround"),
        ("depthwise", "brecq"),
        ("conv", "empirical"),
        ("linear", "analytic"),
        ("conv", "bn_reestimation"),
    ],
)
def test_after_corrections(kind: str, correction: str, tmp_path: Path) -> None:
    model, images = damaged(kind, 1e-11, 1.0, 1e4, 0)
    graph, plan = planned(model, images, mode_activations="asym_u", per_channel_wts=True)
    norms = after_folding(norm_statistics(graph), {})
    calibration = CalibrationImages(lambda: iter([images]), len(images), torch.device("cpu"), tmp_path)
    plan, raised = fit_int32(graph, plan)
    assert raised["0"] >= 2
    offered = {"graph": graph, "plan": plan, "images": calibration, "iterations": 5, "norms": norms}
    found = call(CORRECTIONS[correction], offered)
    assert_fits(graph, found if isinstance(found, Plan) else plan, images)


@pytest.mark.parametrize(("kind", "bits"), [("conv", 4), ("transposed", 8)])
def test_after_training_under_a_quantizer(kind: str, bits: int) -> None:
    layer, images = damaged(kind, 1e-11, 1.0, 1.0, 0)
    norm = nn.BatchNorm2d(6, eps=1e-30)
    model = nn.Sequential(layer[0], norm, *list(layer)[1:]).train()
    model(images)  # the dead channels leave the batch-norm as large as the others
    nn.init.constant_(norm.bias, 1e3)
    spec = PolicySpec(
        Component(
            "quantizers", "LSQQuantizer", "LSQQuantizer", {"bits_weights": bits, "bits_activations": 8}, (), "a.yaml:2"
        ),
        0,
        1,
    )
    work = Quantization(
        capture(model, images[:2], share=True), fold(model, images[:2]), [spec], lambda g, _: statistics(g, images)
    )
    work.on_epoch_begin(0)
    work.module.train()
    optimizer = torch.optim.SGD(work.weights, 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        work.module(images).square().mean().backward()
        optimizer.step()
    work.module.eval()
    learned = work.convert()
    assert learned is not None
    weight = learned[1].layers["0"].weight
    assert weight is not None
    assert weight.raised >= 2
    assert_fits(*learned, images)


def test_scales_are_raised_by_powers_of_two_where_the_bias_does_not_fit() -> None:
    model, images = damaged("conv", 1e-11, 1.0, 1.0, 0)
    graph, plan = planned(model, images, mode_activations="asym_u", per_channel_wts=True)
    fitted, raised = fit_int32(graph, plan)
    assert raised == {"0": 2}
    before, after = (weighted(lower(graph, each))[0] for each in (plan, fitted))
    assert before.bias_codes is not None
    assert before.bias_codes.abs().max() == 2**31 - 1 or before.bias_codes.min() == -(2**31)
    ratio = after.weight_scale / before.weight_scale
    assert torch.equal(ratio[2:], torch.ones(4))
    assert torch.equal(torch.log2(ratio[:2]), torch.log2(ratio[:2]).round())
    assert (ratio[:2] > 1).all()


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_a_plan_that_fits_stays_as_it_is(kind: str) -> None:
    model, images = damaged(kind, 1.0, 1.0, 1.0, 0)
    graph, plan = planned(model, images, mode_activations="asym_u", per_channel_wts=True)
    assert fit_int32(graph, plan) == (plan, {})
