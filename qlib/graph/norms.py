"""What folding forgets: the mean and deviation that a batch-norm gives each channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from qlib.graph.ir import Graph, is_layer, layer_inputs, name_of
from qlib.graph.ops import Concat

__all__ = ["BATCH_NORMS", "NormStatistics", "after_folding", "norm_statistics"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)


@dataclass(frozen=True, eq=False)
class NormStatistics:
    """Mean and standard deviation of each channel of a layer's output, before its activation: ``[channels]``, float64.

    Where the layer ends in a batch-norm these are beta and ``|gamma| * sqrt(var / (var + eps))``, which is ``|gamma|``
    for all channels but those that hardly vary.
    """

    mean: Tensor
    std: Tensor

    def scaled(self, factor: Tensor) -> NormStatistics:
        """Those of the output multiplied, channel by channel, by a positive factor.

        >>> NormStatistics(torch.tensor([1.0]), torch.tensor([2.0])).scaled(torch.tensor([0.5])).std
        tensor([1.])
        """
        return NormStatistics(self.mean * factor, self.std * factor)

    def shifted(self, shift: Tensor) -> NormStatistics:
        """Those of the output with a number added to each channel."""
        return NormStatistics(self.mean + shift, self.std)

    def bound(self, deviations: float) -> Tensor:
        """``mean + deviations * std``.

        >>> NormStatistics(torch.tensor([1.0]), torch.tensor([2.0])).bound(-3.0)
        tensor([-5.])
        """
        return self.mean + deviations * self.std


def norm_statistics(graph: Graph) -> dict[str, NormStatistics]:
    """Node name -> statistics, of a graph whose batch-norms are not folded yet.

    A batch-norm tells those of its output and, from its running mean and variance, those of the layer before it, and
    of the layers that this one, if it does so, concatenates.
    """
    inputs: dict[str, NormStatistics] = {}
    outputs: dict[str, NormStatistics] = {}
    for node in graph.graph.nodes:
        norm = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, BATCH_NORMS) or not isinstance(norm.running_var, Tensor):
            continue
        (source,) = layer_inputs(node)
        outputs[name_of(node)] = _output(norm)
        assert isinstance(norm.running_mean, Tensor)
        seen = NormStatistics(norm.running_mean.detach().double(), norm.running_var.detach().double().sqrt())
        inputs |= _of_sources(graph, source, seen)
    return {**inputs, **outputs}


def _of_sources(graph: Graph, source: fx.Node, seen: NormStatistics) -> dict[str, NormStatistics]:
    """The statistics of a layer that a batch-norm reads; of a concatenation, those of its parts too."""
    if not is_layer(graph, source) or len(source.meta.get("shape", ())) not in (2, 4):
        return {}
    found = {name_of(source): seen}
    module = graph.get_submodule(str(source.target))
    if isinstance(module, Concat) and module.dim == 1:
        parts = layer_inputs(source)
        sizes = [part.meta["shape"][1] for part in parts]
        means, stds = torch.split(seen.mean, sizes), torch.split(seen.std, sizes)
        for part, mean, std in zip(parts, means, stds, strict=True):
            found |= _of_sources(graph, part, NormStatistics(mean, std))
    return found


def after_folding(norms: Mapping[str, NormStatistics], folded: Mapping[str, str]) -> dict[str, NormStatistics]:
    """The statistics of the folded graph's layers; `folded` maps batch-norms to the layers that absorbed them."""
    kept = {name: each for name, each in norms.items() if name not in folded}
    return {**kept, **{layer: norms[norm] for norm, layer in folded.items() if norm in norms}}


@torch.no_grad()
def _output(norm: nn.Module) -> NormStatistics:
    variance, mean = norm.running_var, norm.running_mean
    assert isinstance(variance, Tensor)
    assert isinstance(mean, Tensor)
    gamma = norm.weight.double() if isinstance(norm.weight, Tensor) else torch.ones_like(mean, dtype=torch.float64)
    beta = norm.bias.double() if isinstance(norm.bias, Tensor) else torch.zeros_like(mean, dtype=torch.float64)
    eps = norm.eps
    assert isinstance(eps, float)
    ratio = variance.double() / (variance.double() + eps)
    return NormStatistics(beta.clone(), gamma.abs() * ratio.sqrt())
