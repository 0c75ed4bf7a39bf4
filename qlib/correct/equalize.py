"""Cross-layer equalization: factors move between successive layers until the ranges of their channels are alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.correct._base import CORRECTIONS
from qlib.correct._pairs import Pair, find_pairs
from qlib.graph import Graph, NormStatistics
from qlib.graph.ir import name_of
from qlib.graph.weights import grouped, swap_channels

__all__ = ["equalize", "equalizing_factors"]

_MAX_ROUNDS = 200
_VANISHING = 2.0**-16
_CONVERGED = 1e-4
_DEVIATIONS = 6.0
"""How many standard deviations above the mean a channel is taken to reach: as far as data-free ranges go."""


@CORRECTIONS.register(
    "equalize",
    order=0,
    of_float=True,
    data_free=True,
    help="equalize the weight ranges of successive layers; then collect the statistics",
)
@torch.no_grad()
def equalize(graph: Graph, norms: MutableMapping[str, NormStatistics]) -> list[str]:
    """Equalizes the weights of a folded graph, in place, and scales `norms` along; one line a pair of layers.

    Channel i of a layer is divided by s_i, and what reads it multiplied by s_i: ``W1_i / s_i``, ``b1_i / s_i``,
    ``W2[:, i] * s_i``. Through a ReLU, pools and moves the output stays the same: ``relu(x / s) = relu(x) / s``. With
    the ranges r1_i and r2_i of the channel's weights, ``s_i = sqrt(r1_i * r2_i) / r2_i`` makes both equal. Pair after
    pair, again and again until no factor changes. Grouped convolutions have a range for each of their input channels
    as well; in a depthwise one it is that of the one filter.

    Where `norms` knows the layer, channel i is taken to reach ``x_i``, its mean + 6 standard deviations, and s_i is at
    least ``x_i / max_j x_j``: no channel's values grow beyond what the tensor holds before, as those of a channel with
    a high bias and hardly any weights would. A ReLU6 lets only those channels through that stay below 6, where it does
    not clamp, before and after; others keep their scale.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, sec. 4.1.

    >>> import qlib.graph
    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> model[0].weight.data, model[2].weight.data = torch.tensor([[8.0], [0.5]]), torch.tensor([[0.5, 8.0]])
    >>> graph = qlib.graph.capture(model, torch.zeros(2, 1))
    >>> equalize(graph, {})
    ['Equalized 0 -> 2: the widest weights of a channel were 16.0 times the narrowest, now 1.0 times']
    >>> graph.get_submodule("0").weight.flatten().tolist(), graph.get_submodule("2").weight.flatten().tolist()
    ([2.0, 2.0], [2.0, 2.0])
    """
    pairs, lines = [], []
    for pair in find_pairs(graph):
        if pair.relu6(graph) and name_of(pair.first) not in norms:
            lines.append(f"Not equalized: {pair}, as a ReLU6 lies between and no batch-norm tells how far values reach")
        else:
            pairs.append(pair)
    weights = {node: _Weights(graph.get_submodule(str(node.target))) for p in pairs for node in (p.first, p.second)}
    before = [_imbalance(weights[pair.first].per_output()) for pair in pairs]
    limits = [_limit(graph, pair, norms) for pair in pairs]
    for _ in range(_MAX_ROUNDS):
        moved = [_equalize_pair(pair, weights, norms, limit) for pair, limit in zip(pairs, limits, strict=True)]
        if max(moved, default=0.0) < _CONVERGED:
            break
    for each in weights.values():
        each.write()
    for pair, was in zip(pairs, before, strict=True):
        now = _imbalance(weights[pair.first].per_output())
        lines.append(
            f"Equalized {pair}: the widest weights of a channel were {was:.1f} times the narrowest, now {now:.1f} times"
        )
    return lines


@dataclass(frozen=True)
class Limit:
    """How far values may reach: to `high`; a channel that reaches `free` or more keeps its scale."""

    high: float
    free: float = math.inf


def _limit(graph: Graph, pair: Pair, norms: Mapping[str, NormStatistics]) -> Limit | None:
    norm = norms.get(name_of(pair.first))
    if norm is None:
        return None
    if pair.relu6(graph):
        return Limit(6.0, 6.0)
    high = float(_range_of(pair, norm).max())
    return Limit(high) if high > 0 else None


def _range_of(pair: Pair, norm: NormStatistics) -> Tensor:
    """How far from 0 each channel goes; above it only, where a ReLU follows."""
    high = norm.bound(_DEVIATIONS).clamp(min=0.0)
    return high if pair.activated else torch.maximum(high, -norm.bound(-_DEVIATIONS))


def _equalize_pair(
    pair: Pair, weights: Mapping[fx.Node, _Weights], norms: MutableMapping[str, NormStatistics], limit: Limit | None
) -> float:
    """Moves the factors of one pair; the largest ``|log s|``."""
    first, second = weights[pair.first], weights[pair.second]
    r1 = first.per_output()
    channels = pair.channels.to(r1.device)
    read = channels >= 0
    r2 = torch.zeros_like(r1).scatter_reduce_(0, channels[read], second.per_input()[read], "amax")
    ranges = None if limit is None else _range_of(pair, norms[name_of(pair.first)]).to(r1.device)
    factors = equalizing_factors(r1, r2, ranges, limit)
    first.scale_outputs(1 / factors)
    second.scale_inputs(pair.per_input(factors, 1.0))
    for name in pair.names:
        if name in norms and len(norms[name].mean) == len(factors):
            norms[name] = norms[name].scaled(1 / factors.to(norms[name].mean.device))
    return float(factors.log().abs().max())


def equalizing_factors(r1: Tensor, r2: Tensor, ranges: Tensor | None = None, limit: Limit | None = None) -> Tensor:
    """``s = sqrt(r1 * r2) / r2``; 1 for channels without weights, or with such that round to 0 on any grid.

    Where `ranges` and `limit` are given, ``s >= ranges / limit``.

    >>> equalizing_factors(torch.tensor([8.0, 0.5, 0.0]), torch.tensor([0.5, 8.0, 1.0]))
    tensor([4.0000, 0.2500, 1.0000])
    >>> r1, r2 = torch.tensor([0.5, 0.5]), torch.tensor([8.0, 8.0])
    >>> equalizing_factors(r1, r2, torch.tensor([3.0, 7.0]), Limit(6.0, 6.0))
    tensor([0.5000, 1.0000])
    """
    alive = (r1 > r1.max() * _VANISHING) & (r2 > 0)
    factors = torch.where(alive, (r1 / r2).sqrt(), 1.0)
    if ranges is None or limit is None:
        return factors
    return torch.where(ranges < limit.free, torch.maximum(factors, ranges / limit.high), 1.0)


class _Weights:
    """A layer's weight and bias in float64, which its module gets with `write`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        assert isinstance(module.weight, Tensor)
        self.weight = grouped(module, module.weight.double())
        self.bias = module.bias.double() if isinstance(module.bias, Tensor) else None

    def per_output(self) -> Tensor:
        """The largest magnitude of each output channel."""
        return self.weight.abs().amax((2, 3)).flatten()

    def per_input(self) -> Tensor:
        """The largest magnitude of what reads each input channel."""
        return self.weight.abs().amax((1, 3)).flatten()

    def scale_outputs(self, factors: Tensor) -> None:
        self.weight *= factors.view(*self.weight.shape[:2], 1, 1)
        if self.bias is not None:
            self.bias = self.bias * factors

    def scale_inputs(self, factors: Tensor) -> None:
        self.weight *= factors.view(self.weight.shape[0], 1, -1, 1)

    def write(self) -> None:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        rows = self.weight.view(swap_channels(self.module, weight).shape)
        weight.copy_(swap_channels(self.module, rows))  # which is its own inverse
        if isinstance(self.module.bias, Tensor) and self.bias is not None:
            self.module.bias.copy_(self.bias)


def _imbalance(ranges: Tensor) -> float:
    used: Sequence[float] = ranges[ranges > 0].tolist() or [1.0]
    return max(used) / min(used)
