"""The saturation hazard: what a lowered model computes on an x86 CPU without VNNI.

There, ONNX Runtime multiplies uint8 activations by int8 weights with an instruction (vpmaddubsw) that adds the products
of two neighbours in 16 bits, and saturates. Measured with onnxruntime 1.31.1 on an AVX2 CPU, over layer shapes, sizes
and both layouts: neighbours are k and k + 1, k even, of the summed axis in the order (kernel position, channel of the
group); the codes are the deployed ones, with zero points in, and padding is the zero point. Depthwise convolution,
uint8 weights and all that ONNX Runtime computes in float do not saturate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qlib.lower.accumulator import rounded_sum
from qlib.lower.base import EXACT_LIMIT, ActivationGrid
from qlib.lower.exact import activation_grid
from qlib.lower.ops.weighted import ExactWeighted
from qlib.lower.pairs import MAX_EXCESS, Pairs, Window, hazardous_pairs

__all__ = ["SaturatingWeighted", "SaturationRate", "emulated", "pairs_at_risk", "saturation_rates"]

_CHUNK = 2**21
"""Elements that are worked on at once."""


@dataclass(frozen=True)
class SaturationRate:
    """How often a layer saturated: `pairs` of its neighbouring weights can, `saturated` of `outputs` accumulators did.

    Law: `saturated` is 0 where `pairs` is.
    """

    pairs: int
    saturated: int
    outputs: int

    @property
    def possible(self) -> bool:
        """Whether the layer can saturate for any codes."""
        return self.pairs > 0

    @property
    def share(self) -> float:
        """The share of accumulators that saturated, 0 to 1."""
        return self.saturated / self.outputs if self.outputs else 0.0


class SaturatingWeighted(nn.Module):
    """The layer `exact` on such a CPU: ``acc - sum of the excess of each pair beyond 16 bits``, requantized as before.

    `saturated` counts the accumulators in which any pair saturated, of the `outputs` that were computed.
    """

    def __init__(self, exact: ExactWeighted) -> None:
        super().__init__()
        self.exact, self.saturated, self.outputs = exact, 0, 0
        self.window = _window(exact)
        self.pairs = Pairs.of(exact.weight_codes, _top(exact), self.window)
        outs = [pairs.out for pairs in self.pairs]
        largest = int(torch.bincount(torch.cat(outs)).max()) if outs else 0
        self.dtype = torch.float32 if largest * MAX_EXCESS < EXACT_LIMIT else torch.float64

    @property
    def rate(self) -> SaturationRate:
        """What was counted."""
        return SaturationRate(sum(len(pairs.out) for pairs in self.pairs), self.saturated, self.outputs)

    def forward(self, codes: Tensor) -> Tensor:
        sums = self.exact.partial_sums(codes)
        self.outputs += sums[0].numel()
        excess = self._excess(codes, sums[0].shape)
        return self.exact.requantize(rounded_sum(sums if excess is None else [*sums, excess.neg_()]))

    def _excess(self, codes: Tensor, shape: torch.Size) -> Tensor | None:
        """The excess of all pairs, of the shape of the accumulators; None where there is none."""
        if self.exact.ndim == 0:
            codes, sizes = codes.reshape(-1, codes.shape[-1], 1), torch.Size([1])
        else:
            codes, sizes = codes if self.exact.pad is None else self.exact.pad(codes), shape[2:]
        total: Tensor | None = None
        hit = codes.new_zeros(shape.numel(), dtype=torch.bool)
        for excess, sample, channel, *place in self._saturations(codes):
            inside, index = torch.ones_like(sample, dtype=torch.bool), sample * len(self.exact.weight_codes) + channel
            for at, size in zip(place, sizes, strict=True):
                inside &= (at >= 0) & (at < size)
                index = index * size + at
            index = index[inside]
            total = codes.new_zeros(shape.numel(), dtype=self.dtype) if total is None else total
            total.index_add_(0, index, excess[inside].to(self.dtype))
            hit[index] = True
        self.saturated += int(hit.count_nonzero())
        return None if total is None else total.view(shape)

    def _saturations(self, codes: Tensor) -> Iterator[tuple[Tensor, ...]]:
        samples = max(1, _CHUNK // codes[0].numel())
        for first in range(0, len(codes), samples):
            padded = self.window.padded(codes[first : first + samples])
            for pairs in self.pairs:
                for excess, sample, *rest in pairs.saturations(padded, self.exact.source.zero_point, self.window):
                    yield excess, sample + first, *rest


def _window(layer: ExactWeighted) -> Window:
    """The geometry of a layer that is not transposed."""
    apply, kernel = layer.apply_weight, tuple(layer.weight_codes.shape[2:])
    assert not apply.transposed
    if not kernel:
        return Window()
    spans = [step * (size - 1) for size, step in zip(kernel, apply.dilation, strict=True)]
    pads = apply.pads or tuple((span // 2, span - span // 2) for span in spans)
    return Window(kernel, apply.stride, apply.dilation, pads, apply.groups)


def _top(layer: ExactWeighted) -> int:
    """The largest deployed code that arrives."""
    return layer.source.high + layer.source.zero_point


def _adds_in_pairs(layer: ExactWeighted, output: ActivationGrid) -> bool:
    """Whether the layer runs on the kernel that saturates."""
    codes, apply = layer.weight_codes, layer.apply_weight
    if apply.transposed:  # ONNX Runtime computes it in float
        return False
    depthwise = apply.axes > 0 and codes.shape[1] == 1 and apply.groups == len(codes)
    in_bytes = layer.source.dtype == output.dtype == torch.uint8 and codes.dtype == torch.int8
    return in_bytes and not depthwise


def _adding_in_pairs(lowered: fx.GraphModule) -> Iterator[tuple[str, ExactWeighted]]:
    for node in lowered.graph.nodes:
        layer = lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        grid = activation_grid(node)
        if isinstance(layer, ExactWeighted) and grid is not None and _adds_in_pairs(layer, grid):
            yield str(node.target), layer


def pairs_at_risk(lowered: fx.GraphModule) -> dict[str, int]:
    """The worst case: for each layer on the kernel that saturates, how many pairs of weights can, whatever the image.

    `lowered` is a model of `lower_exact`; layers that cannot saturate on any CPU are left out (see above).
    """
    return {name: len(hazardous_pairs(layer.weight_codes, _top(layer))) for name, layer in _adding_in_pairs(lowered)}


def emulated(lowered: fx.GraphModule) -> fx.GraphModule:
    """A model that computes, bit for bit, what ONNX Runtime computes on such a CPU from `lowered`, of `lower_exact`.

    It shares the integers of `lowered`; each layer that can saturate is a `SaturatingWeighted`, which counts.
    """
    model = fx.GraphModule(lowered, copy.deepcopy(lowered.graph))
    for name, layer in _adding_in_pairs(lowered):
        saturating = SaturatingWeighted(layer)
        if saturating.rate.possible:
            model.set_submodule(name, saturating)
    return model.eval()


def saturation_rates(lowered: fx.GraphModule, batches: Iterable[Tensor]) -> dict[str, SaturationRate]:
    """How often each layer of `pairs_at_risk` saturates on `batches` of images, where those before it saturate as well.

    Where no pair can, nothing is computed: `outputs` is 0.
    """
    model = emulated(lowered)
    for batch in batches:
        model(batch)
    layers = {name: model.get_submodule(name) for name, _ in _adding_in_pairs(lowered)}
    none = SaturationRate(0, 0, 0)
    return {name: layer.rate if isinstance(layer, SaturatingWeighted) else none for name, layer in layers.items()}
