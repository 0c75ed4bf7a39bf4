"""Stochastic rounding of weights: up or down at random, so that the mean is right."""

from __future__ import annotations

import torch
from torch import Tensor

from qlib.correct._base import CORRECTIONS
from qlib.correct._write_back import write_back
from qlib.graph import Graph
from qlib.lower.fake import FakeLayer, FakeWeight, lower_fake
from qlib.quant.plan import Plan


@CORRECTIONS.register("stochastic", choice="rounding")
@torch.no_grad()
def stochastic(graph: Graph, plan: Plan) -> Plan:
    """Sets the weights of `graph` to ``floor(w / s + u) * s`` with u uniform in [0, 1).

    References: Gupta et al., "Deep learning with limited numerical precision", 2015, section 3.
    """
    torch.manual_seed(0)
    fake = lower_fake(graph, plan)
    for layer in fake.modules():
        if isinstance(layer, FakeLayer) and isinstance(layer.weight, FakeWeight):
            weight = layer.module.weight
            assert isinstance(weight, Tensor)
            weight.copy_(torch.floor(weight / layer.weight.scale + torch.rand_like(weight)) * layer.weight.scale)
    return write_back(graph, fake, plan)
