"""Batch-norm re-estimation: each channel gets the mean and deviation back that it had before rounding."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._pairs import shared_layers, single_layers
from qlib.correct._walk import channel_moments, layer_outputs
from qlib.correct._write_back import write_back
from qlib.graph import Graph
from qlib.graph.ir import name_of
from qlib.graph.weights import give_bias, swap_channels
from qlib.lower.fake import FakeLayer, FakeWeight, lower_fake
from qlib.quant.affine import QParams
from qlib.quant.plan import Plan

__all__ = ["bn_reestimation", "factor_and_bias"]

_log = logging.getLogger(__name__)

_LIMITS = (0.5, 2.0)
"""Of the factor: channels that hardly vary have no deviation worth restoring."""


@CORRECTIONS.register(
    "bn_reestimation",
    order=20,
    images=True,
    help="match mean and deviation of each channel to those of the float model",
)
@torch.no_grad()
def bn_reestimation(graph: Graph, plan: Plan, images: CalibrationImages, reference: Graph | None = None) -> Plan:
    """Matches mean and deviation of each quantized channel to the float one's; changes `graph`, returns the new plan.

    Layer after layer, with those before it fake-quantized and corrected, as a batch-norm that was not folded would do
    if its statistics were taken anew on the fake-quantized model. The factor ``g = std(y) / std(y_q)`` goes into the
    channel's weight and its range alike, so that the codes stay; the bias takes the rest. A weight with one range for
    all channels, or with scales of powers of two, gets no factor: there only the means are matched. `reference` as in
    `bias_correction`.

    References: Sun et al., "Hybrid 8-bit floating point training and inference", 2019, whose batch-norms are tuned
    on the quantized model; Nagel et al., "Overcoming oscillations in quantization-aware training", 2022.
    """
    names = set()
    for node in single_layers(graph):
        if plan.layers[name_of(node)].weight is not None:
            give_bias(graph.get_submodule(str(node.target)))
            names.add(name_of(node))
    if shared := ", ".join(map(name_of, shared_layers(graph))):
        _log.info("Not re-estimated, as they are called, or their weights used, more than once: %s", shared)
    fake = lower_fake(graph, plan)
    for each in layer_outputs(reference or graph, fake, images, "Batch-norm re-estimation"):
        weight = plan.layers[each.name].weight
        if each.name not in names or weight is None:
            continue
        module = each.layer.module
        exact, fake_moments = channel_moments(module, each.exact), channel_moments(module, each.fake)
        bias = give_bias(module)
        free = weight.per_channel and not weight.spec.pow2
        std = fake_moments.std if free else exact.std
        factor, new = factor_and_bias((exact.mean, exact.std), (fake_moments.mean, std), bias.double())
        bias.copy_(new)
        _multiply(each.layer, factor)
    return write_back(graph, fake, plan)


def factor_and_bias(exact: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
    """The factor ``g = std / std_q``, within 1/2 and 2, and the bias ``mean - g * (mean_q - b)``.

    >>> factor, bias = factor_and_bias((torch.tensor(1.0), torch.tensor(3.0)), (torch.tensor(2.0), torch.tensor(2.0)),
    ...     torch.tensor(1.0))
    >>> factor.item(), bias.item()
    (1.5, -0.5)
    """
    (mean, std), (mean_q, std_q) = exact, fake
    factor = torch.where((std > 0) & (std_q > 0), std / std_q, 1.0).clamp(*_LIMITS)
    return factor, mean - factor * (mean_q - bias)


def _multiply(layer: FakeLayer, factor: Tensor) -> None:
    """Multiplies the weight and its grid: the codes stay."""
    rounding, module = layer.weight, layer.module
    assert isinstance(rounding, FakeWeight)
    if bool((factor == 1).all()):
        return
    assert isinstance(module.weight, Tensor)
    params = rounding.params
    scale = (params.scale.double() * factor).float()
    rows = swap_channels(module, module.weight)
    exact = (scale.double() / params.scale.double()).view(-1, *[1] * (rows.ndim - 1))
    module.weight.copy_(swap_channels(module, rows.double() * exact))
    rounding.params = QParams(scale, params.zero_point, params.spec)
    rounding.scale.copy_(scale.view(rounding.scale.shape))
