"""Smoothing: outlier channels after a layer norm shrink, and the weights that read them grow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.correct._base import BATCH, CORRECTIONS, CalibrationImages
from qlib.correct._pairs import passes, single_layers
from qlib.graph import Graph
from qlib.graph.channels import Origin, input_origins
from qlib.graph.ir import name_of
from qlib.graph.walk import readers_of
from qlib.graph.weights import grouped, swap_channels
from qlib.progress import track

__all__ = ["smooth", "smoothing_factors"]


@dataclass(frozen=True, eq=False)
class _Site:
    """A layer norm, and the layers that read it, with the channels of the norm that their inputs hold."""

    norm: fx.Node
    readers: tuple[tuple[fx.Node, Origin], ...]


@CORRECTIONS.register(
    "smooth",
    order=2,
    of_float=True,
    images=True,
    number={"name": "alpha", "low": 0, "high": 1},
    help="move outliers of activations after layer norms into the weights, by this power (0.5 is usual)",
)
@torch.no_grad()
def smooth(graph: Graph, images: CalibrationImages, alpha: float) -> list[str]:
    """Moves the ranges of channels from layer norms to the weights that read them, in place; one line a layer norm.

    Channel j of the norm's affine parameters is divided by ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``, and input
    channel j of all layers that read it is multiplied: the output stays the same. The maxima of x are over the
    calibration images, those of W over all readers. `alpha` 0 leaves the burden to activations, 1 to weights.

    References: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language
    models", 2023, section 4.
    """
    sites, lines = [], []
    for node, found in _sites(graph):
        if isinstance(found, str):
            lines.append(f"Not smoothed: {name_of(node)}, as {found}")
        else:
            sites.append(found)
    if not sites:
        return [*lines, "Nothing to smooth: no layer norm is read by convolutions or linear layers alone"]
    maxima = _maxima(graph, [site.norm for site in sites], images)
    for site in sites:
        norm = graph.get_submodule(str(site.norm.target))
        before = maxima[site.norm]
        weights = torch.zeros_like(before)
        for reader, origin in site.readers:
            weights = torch.maximum(weights, _read(graph.get_submodule(str(reader.target)), origin, len(before)))
        factors = smoothing_factors(before, weights, alpha)
        for parameter in (norm.weight, norm.bias):
            if isinstance(parameter, Tensor):
                parameter.copy_(parameter.double() / factors)
        for reader, origin in site.readers:
            _multiply(graph.get_submodule(str(reader.target)), origin, factors)
        after = before / factors
        names = ", ".join(name_of(reader) for reader, _ in site.readers)
        lines.append(
            f"Smoothed {name_of(site.norm)} -> {names}: the largest channel was {_spread(before):.1f} times the median,"
            f" now {_spread(after):.1f} times"
        )
    return lines


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``s = activations^alpha / weights^(1 - alpha)`` of the channels' maxima; 1 where either is 0.

    >>> smoothing_factors(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]), 0.5)
    tensor([4.0000, 0.5000, 1.0000])
    """
    used = (activations > 0) & (weights > 0)
    return torch.where(used, activations**alpha / weights ** (1 - alpha), 1.0)


def _sites(graph: Graph) -> list[tuple[fx.Node, _Site | str]]:
    """Each layer norm with its readers, or with the reason why it cannot be scaled."""
    origins, single = input_origins(graph), set(single_layers(graph))
    found: list[tuple[fx.Node, _Site | str]] = []
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.LayerNorm):
            continue
        if len(module.normalized_shape) != 1 or not isinstance(module.weight, Tensor):
            found.append((node, "it has no factor for each channel"))
            continue
        readers = readers_of(graph, node, passes)
        wrong = [reader for reader in readers if reader not in single or reader not in origins]
        if wrong:
            what = "it gives the model's output" if wrong[0].op == "output" else f"{name_of(wrong[0])!r} reads it"
            found.append((node, what))
        else:
            found.append((node, _Site(node, tuple((reader, origins[reader]) for reader in readers))))
    return found


def _maxima(graph: Graph, nodes: list[fx.Node], images: CalibrationImages) -> dict[fx.Node, Tensor]:
    """The largest magnitude of each channel of layer norms, in float64."""
    maxima: dict[str, Tensor] = {}

    def hook(target: str) -> object:
        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            seen = output.detach().abs().flatten(0, -2).amax(0).double()
            maxima[target] = torch.maximum(maxima[target], seen) if target in maxima else seen

        return graph.get_submodule(target).register_forward_hook(note)

    handles = [hook(str(node.target)) for node in nodes]
    for batch in track(
        images.batches(), total_images=images.count, batch_size=BATCH, description="Smoothing", print_freq=10, count=len
    ):
        graph(batch)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return {node: maxima[str(node.target)] for node in nodes}


def _read(module: nn.Module, origin: Origin, channels: int) -> Tensor:
    """The largest magnitude of the weights that read each channel."""
    assert isinstance(module.weight, Tensor)
    ranges = grouped(module, module.weight.double()).abs().amax((1, 3)).flatten()
    source = origin.channels.to(ranges.device)
    read = source >= 0
    return ranges.new_zeros(channels).scatter_reduce_(0, source[read], ranges[read], "amax")


def _multiply(module: nn.Module, origin: Origin, factors: Tensor) -> None:
    assert isinstance(module.weight, Tensor)
    weight, source = grouped(module, module.weight.double()), origin.channels.to(factors.device)
    mine = torch.where(source >= 0, factors[source.clamp(min=0)], 1.0)
    weight *= mine.view(weight.shape[0], 1, -1, 1)
    module.weight.copy_(swap_channels(module, weight.view(swap_channels(module, module.weight).shape)))


def _spread(maxima: Tensor) -> float:
    return float(maxima.max() / maxima.median().clamp(min=1e-30))
