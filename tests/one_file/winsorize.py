"""Winsorizing: the outliers of a layer's weights are pulled in before ranges are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from qlib.correct._base import CORRECTIONS
from qlib.correct._pairs import single_layers
from qlib.graph import Graph
from qlib.graph.ir import name_of


@CORRECTIONS.register(
    "winsorize",
    of_float=True,
    number={"name": "share", "low": 0, "high": 1},
    help="clamp the weights of each layer to this share of their largest magnitude",
)
@torch.no_grad()
def winsorize(graph: Graph, share: float) -> list[str]:
    """Clamps each weight to +- `share` of the largest magnitude of its layer, in place; one line a layer."""
    lines = []
    for node in single_layers(graph):
        weight = graph.get_submodule(str(node.target)).weight
        assert isinstance(weight, Tensor)
        top = share * weight.abs().max()
        lines.append(f"Winsorized {name_of(node)}: {int((weight.abs() > top).sum())} weights")
        weight.clamp_(-top, top)
    return lines
