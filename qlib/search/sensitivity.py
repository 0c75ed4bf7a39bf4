"""How much each layer alone suffers from few bits: the weights, or the activations, of one layer at a time.

All else stays in float. On each batch of images the float model runs once; behind it, step by step, each variant runs
only from the layer that it changes to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.metrics import Meter
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.search.replay import FLOAT, WEIGHT, QuantState, Replay, Slot, State, grid_of, slots

__all__ = ["ACTIVATIONS", "WEIGHTS", "Sensitivity", "Study", "sqnr"]

WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True)
class Sensitivity:
    """What few bits in one layer alone do: `what` is weights or activations (inputs that the layer rounds, and output).

    The signal-to-noise ratios, in dB, are those of the layer's output (behind a fused ReLU) and of the logits; they
    are infinite where nothing changes. `divergence` is the mean Kullback-Leibler divergence, in nats, of the predicted
    distribution from that of the float model: the expected increase of the loss if the float model is right.
    """

    layer: str
    what: str
    bits: int
    sqnr_output: float
    sqnr_logits: float
    loss: float
    top1: float
    divergence: float


def sqnr(signal: float, noise: float) -> float:
    """The ratio of two energies in dB: ``10 log10(signal / noise)``.

    >>> sqnr(100.0, 1.0), sqnr(1.0, 0.0)
    (20.0, inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class _Variant:
    """One layer at some bits, and the sums over the images so far."""

    layer: str
    what: str
    bits: int
    module: nn.Module
    grids: Mapping[Slot, TensorPlan | WeightPlan]
    begin: int
    signal: float = 0.0
    noise: float = 0.0
    logit_signal: float = 0.0
    logit_noise: float = 0.0
    divergence: float = 0.0
    meter: Meter = field(default_factory=Meter)

    @property
    def point(self) -> QuantState:
        """Made anew each time: the rounded weights of all variants would be many times the model."""
        point = FLOAT
        for slot, grid in self.grids.items():
            point = point.with_slot(slot, grid, self.module)
        return point

    def add_output(self, reference: Tensor, changed: Tensor) -> None:
        self.signal += _energy(reference)
        self.noise += _energy(changed - reference)

    def add_logits(self, reference: Tensor, changed: Tensor, labels: Tensor) -> None:
        self.logit_signal += _energy(reference)
        self.logit_noise += _energy(changed - reference)
        self.divergence += divergence(reference, changed)
        self.meter.add(changed, labels)

    def result(self) -> Sensitivity:
        loss, top1, _ = self.meter.running
        output, logits = sqnr(self.signal, self.noise), sqnr(self.logit_signal, self.logit_noise)
        mean = self.divergence / self.meter.samples
        return Sensitivity(self.layer, self.what, self.bits, output, logits, loss, top1, mean)


def _energy(x: Tensor) -> float:
    return float(x.float().pow(2).sum(dtype=torch.float64))


def divergence(reference: Tensor, changed: Tensor) -> float:
    """``sum p (log p - log q)`` over images and classes: p of the reference's logits ``[N, C]``, q of the changed ones.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 100.0]])
    >>> divergence(even, even), round(divergence(sure, even), 4)
    (0.0, 0.6931)
    """
    p, q = F.log_softmax(reference.double(), 1), F.log_softmax(changed.double(), 1)
    return float(F.kl_div(q, p, reduction="sum", log_target=True))


class Study:
    """The sensitivities of a graph's layers under plans of several bit-widths, which are not dynamic.

    ``plans[b]`` has b bits wherever something is to be measured; what its layers leave in float is left out.
    """

    def __init__(self, graph: Graph, plans: Mapping[int, Plan], kinds: Sequence[str] = (WEIGHTS, ACTIVATIONS)) -> None:
        self.replay = Replay(graph)
        self.reference = Meter()
        self._variants = [
            variant
            for node, module in layers(graph)
            for what in kinds
            for bits, plan in sorted(plans.items())
            if (variant := self._variant(name_of(node), module, what, bits, plan.layers[name_of(node)])) is not None
        ]
        self._variants.sort(key=lambda variant: variant.begin)

    def _variant(self, name: str, module: nn.Module, what: str, bits: int, layer: LayerPlan) -> _Variant | None:
        changed = [slot for slot in slots(name, layer) if (slot[1] == WEIGHT) == (what == WEIGHTS)]
        if not changed:
            return None
        grids = {slot: grid_of(layer, slot) for slot in changed}
        return _Variant(name, what, bits, module, grids, min(self.replay.position(slot) for slot in changed))

    def __len__(self) -> int:
        """How many variants each batch is run through."""
        return len(self._variants)

    @property
    def names(self) -> set[str]:
        """The layers that are measured."""
        return {variant.layer for variant in self._variants}

    @torch.inference_mode()
    def steps(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[int]:
        """Measures on ``(images, labels)``; yields the number of images after each variant of each batch."""
        for images, labels in batches:
            state = self.replay.start(images)
            logits = self.replay.logits(self.replay.run(state, 0, self.replay.end))
            self.reference.add(logits, labels)
            position = 0
            for variant in self._variants:
                state, position = self.replay.run(state, position, variant.begin), variant.begin
                self._measure(variant, state, logits, labels)
                yield len(images)

    def _measure(self, variant: _Variant, state: State, logits: Tensor, labels: Tensor) -> None:
        step, output = self.replay.output_of(variant.layer)
        reference = self.replay.run(state, variant.begin, step)
        changed = self.replay.run(state, variant.begin, step, variant.point)
        variant.add_output(reference[output], changed[output])
        variant.add_logits(logits, self.replay.logits(self.replay.run(changed, step, self.replay.end)), labels)

    def results(self) -> list[Sensitivity]:
        """The sensitivities, in execution order, fewest bits first."""
        return [variant.result() for variant in self._variants]
