"""Bias absorption: what a channel always exceeds moves into the bias of the next layer."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from qlib.correct._base import CORRECTIONS
from qlib.correct._pairs import Pair, find_pairs
from qlib.graph import Graph, NormStatistics
from qlib.graph.ir import name_of
from qlib.graph.weights import give_bias, grouped

__all__ = ["absorb_bias", "absorbed_bias"]

_DEVIATIONS = 3.0


@CORRECTIONS.register(
    "absorb_bias", order=1, of_float=True, help="move high biases into the next layer; after --ptq-equalize"
)
@torch.no_grad()
def absorb_bias(graph: Graph, norms: MutableMapping[str, NormStatistics]) -> list[str]:
    """Lowers biases of a folded graph, in place, and the means in `norms`; one line a pair of layers.

    With ``c = max(0, beta - 3 * gamma)``, ``b1 - c`` and ``b2 + W2 c``: equalization makes some activations large, and
    this takes away what 99.865 % of normally distributed values exceed, and ``relu(x - c) = relu(x) - c`` for those.
    The few values below it change. A layer that pads with zeros would miss c there, so it absorbs nothing; through a
    ReLU6 only channels go whose mean + 6 standard deviations stays below 6.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, 4.1.3.

    >>> import qlib.graph
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    >>> graph = qlib.graph.capture(model, torch.zeros(2, 1))
    >>> for name, weight, bias in (("0", 1.0, 5.0), ("2", 2.0, 0.0)):
    ...     graph.get_submodule(name).weight.data.fill_(weight), graph.get_submodule(name).bias.data.fill_(bias)
    (tensor([[1.]]), tensor([5.]))
    (tensor([[2.]]), tensor([0.]))
    >>> absorb_bias(graph, {"0": NormStatistics(torch.tensor([5.0]), torch.tensor([1.0]))})
    ['Absorbed bias: 0 -> 2, 1 of 1 channels, at most 2']
    >>> graph.get_submodule("0").bias.item(), graph.get_submodule("2").bias.item()
    (3.0, 4.0)
    """
    lines = []
    for pair in find_pairs(graph):
        norm = norms.get(name_of(pair.first))
        if norm is None:
            continue
        shift = absorbed_bias(norm, below_6=pair.relu6(graph))
        count = int((shift > 0).sum())
        if not count:
            continue
        if _pads(graph, pair):
            lines.append(f"Bias not absorbed: {pair}, as zeros are padded between them")
            continue
        _move(graph, pair, shift, norms)
        lines.append(f"Absorbed bias: {pair}, {count} of {len(shift)} channels, at most {float(shift.max()):.3g}")
    return lines


def absorbed_bias(norm: NormStatistics, *, below_6: bool = False) -> Tensor:
    """``c = max(0, mean - 3 * std)``; with `below_6`, 0 where ``mean + 6 * std`` is above 6.

    >>> absorbed_bias(NormStatistics(torch.tensor([5.0, 1.0]), torch.tensor([1.0, 1.0])))
    tensor([2., 0.])
    """
    shift = norm.bound(-_DEVIATIONS).clamp(min=0.0)
    return torch.where(norm.bound(6.0) < 6, shift, 0.0) if below_6 else shift


def _move(graph: Graph, pair: Pair, shift: Tensor, norms: MutableMapping[str, NormStatistics]) -> None:
    first, second = (graph.get_submodule(str(node.target)) for node in (pair.first, pair.second))
    assert isinstance(second.weight, Tensor)
    shift = shift.to(second.weight.device)
    weight = grouped(second, second.weight.double())
    read = pair.per_input(shift, 0.0).view(weight.shape[0], 1, -1, 1)
    for module, change in ((first, -shift), (second, (weight * read).sum((2, 3)).flatten())):
        bias = give_bias(module)
        bias.copy_(bias.double() + change)
    for name in pair.names:
        if name in norms:
            norms[name] = norms[name].shifted(-shift.to(norms[name].mean.device))


def _pads(graph: Graph, pair: Pair) -> bool:
    """Whether zeros come beside the values on the way, or at the border of the second layer or of an average pool."""
    modules = [graph.get_submodule(str(n.target)) for n in (*pair.between, pair.second) if n.op == "call_module"]
    second = modules[-1]
    transposed = isinstance(second, nn.modules.conv._ConvTransposeNd)  # its border has fewer taps, padded or not
    averaged = any(isinstance(m, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)) and _any(m.padding) for m in modules[:-1])
    zeros = getattr(second, "padding_mode", "zeros") == "zeros" and _any(getattr(second, "padding", 0))
    return pair.padded or transposed or averaged or zeros


def _any(padding: object) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple) else bool(padding)
