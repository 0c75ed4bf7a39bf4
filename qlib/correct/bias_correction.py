"""Bias correction: rounding weights shifts the mean of a channel, and its bias takes the shift away."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._pairs import shared_layers, single_layers
from qlib.correct._walk import Outputs, channel_moments, layer_outputs
from qlib.graph import Graph, NormStatistics, activation_bounds, fused_activations
from qlib.graph.ir import layer_inputs, name_of
from qlib.graph.weights import give_bias, over_channels
from qlib.lower.fake import FakeLayer, FakeWeight, lower_fake
from qlib.quant.plan import Plan
from qlib.stats.moments import propagate

__all__ = ["analytic_bias_correction", "bias_correction"]


@CORRECTIONS.register("empirical", order=30, choice="bias_correction", images=True)
@torch.no_grad()
def bias_correction(graph: Graph, plan: Plan, images: CalibrationImages, reference: Graph | None = None) -> list[str]:
    """Corrects the biases of `graph`, in place, by what the calibration images show; log lines.

    Layer after layer, with those before it fake-quantized and corrected: ``b - (E[y_q] - E[y])`` for each output
    channel, where y_q is the fake-quantized layer's output before its grid, and y that of `reference`, which is `graph`
    as it is unless given (after a rounding, which has changed the weights, the float graph from before it). Where a
    ReLU or ReLU6 follows, the means are over the values of y that it lets through: of the others nobody sees the
    shift, and to take it from all would shift those that are seen. A layer without bias gets one.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, app. D.
    """
    corrected = _give_biases(graph, plan)
    fake = lower_fake(graph, plan)
    bounds = {name_of(node): activation_bounds(graph, relu) for node, relu in fused_activations(graph).items()}
    shifts: dict[str, tuple[float, float]] = {}
    for each in layer_outputs(reference or graph, fake, images, "Bias correction"):
        if each.name not in corrected:
            continue
        module = each.layer.module
        shift = _shift(module, each, bounds.get(each.name, (-math.inf, math.inf)))
        bias = give_bias(module)
        bias.copy_(bias.double() - shift)
        shifts[each.name] = _relative(shift, channel_moments(module, each.exact).std)
    _copy_biases(fake, corrected)  # only now: until here `graph` may be the reference
    return [_summary("Bias correction", shifts), *_not_corrected(graph)]


def _shift(module: nn.Module, outputs: Outputs, bounds: tuple[float, float]) -> Tensor:
    """Mean of ``y_q - y`` of each channel over the values y between `bounds`; 0 where there is none."""
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for fake, exact in zip(outputs.fake, outputs.exact, strict=True):
        y_q, y = over_channels(module, fake), over_channels(module, exact)
        seen = (y > bounds[0]) & (y < bounds[1])
        total = total + ((y_q - y) * seen).sum(0, dtype=torch.float64)
        count = count + seen.sum(0)
    return total / count.clamp(min=1)


@CORRECTIONS.register("analytic", order=31, choice="bias_correction", data_free=True)
@torch.no_grad()
def analytic_bias_correction(graph: Graph, plan: Plan, norms: Mapping[str, NormStatistics]) -> list[str]:
    """Corrects the biases of `graph`, in place, without images; log lines.

    ``b - (W~ - W) E[x]`` for the quantized weight W~. E[x] follows from the batch-norm before: a normal distribution of
    mean beta and deviation gamma, cut by the activation, ``E[relu(x)] = gamma * phi(-beta / gamma) + beta * (1 -
    Phi(-beta / gamma))``. Layers whose input is not known, as the first one's, stay as they are.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, sec. 4.2.
    """
    corrected = _give_biases(graph, plan)
    fake = lower_fake(graph, plan)
    layers = {name_of(n): fake.get_submodule(str(n.target)) for n in fake.graph.nodes if n.op == "call_module"}
    nodes = {name_of(node): node for node in graph.graph.nodes}
    shifts: dict[str, tuple[float, float]] = {}
    skipped = []
    moments = propagate(graph, norms, None)
    for name, module in corrected.items():
        layer = layers[name]
        assert isinstance(layer, FakeLayer)
        mean = moments[layer_inputs(nodes[name])[0]].mean
        if not isinstance(layer.weight, FakeWeight):
            continue
        if bool(mean.isnan().any()):
            skipped.append(name)
            continue
        shift = _expected_shift(module, layer.weight, mean)
        bias = give_bias(module)
        bias.copy_(bias.double() - shift)
        std = norms[name].std.to(shift.device) if name in norms else torch.full_like(shift, torch.nan)
        shifts[name] = _relative(shift, std)
    lines = [_summary("Analytic bias correction", shifts), *_not_corrected(graph)]
    if skipped:
        lines.append(f"Not corrected, as no batch-norm tells the mean of their input: {', '.join(skipped)}")
    return lines


def _expected_shift(module: nn.Module, rounding: FakeWeight, mean: Tensor) -> Tensor:
    """``(W~ - W) E[x]`` of each output channel, over all positions: at the border fewer taps count."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    error = rounding(weight) - weight
    zero = torch.zeros_like(give_bias(module))
    y = torch.func.functional_call(module, {"weight": error, "bias": zero}, (mean.to(weight.device, weight.dtype),))
    return over_channels(module, y).double().mean(0)


def _give_biases(graph: Graph, plan: Plan) -> dict[str, nn.Module]:
    """The weighted layers that `plan` quantizes in any way, each with a bias."""
    corrected = {}
    for node in single_layers(graph):
        layer = plan.layers[name_of(node)]
        if layer.weight is not None or layer.output is not None or any(layer.inputs):
            corrected[name_of(node)] = module = graph.get_submodule(str(node.target))
            give_bias(module)
    return corrected


def _copy_biases(fake: torch.fx.GraphModule, corrected: Mapping[str, nn.Module]) -> None:
    for node in fake.graph.nodes:
        layer = fake.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, FakeLayer) and name_of(node) in corrected:
            give_bias(corrected[name_of(node)]).copy_(give_bias(layer.module))


def _not_corrected(graph: Graph) -> list[str]:
    names = ", ".join(map(name_of, shared_layers(graph)))
    return [f"Not corrected, as they are called, or their weights used, more than once: {names}"] if names else []


def _relative(shift: Tensor, std: Tensor) -> tuple[float, float]:
    """Mean and maximum over the channels of ``|shift| / std``."""
    ratio = torch.where(std > 0, shift.abs() / std, 0.0)
    return float(ratio.mean()), float(ratio.max())


def _summary(what: str, shifts: Mapping[str, tuple[float, float]]) -> str:
    known = {name: shift for name, shift in shifts.items() if shift[0] == shift[0]}
    if not known:
        return f"{what}: {len(shifts)} layers"
    worst = max(known, key=lambda name: known[name][1])
    mean = sum(shift[0] for shift in known.values()) / len(known)
    return (
        f"{what}: {len(shifts)} layers; means of channels were off by {mean:.3f} standard deviations on average,"
        f" at most {known[worst][1]:.3f}, in {worst}"
    )
