"""How good a whole plan is on calibration images, from the point that it rounds to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlib.graph import Graph
from qlib.metrics import Meter
from qlib.search.replay import QuantState, Replay
from qlib.search.sensitivity import divergence

__all__ = ["Score", "Scorer"]


@dataclass(frozen=True)
class Score:
    """Mean loss, Top1 in percent, and mean divergence from the float model's predictions."""

    loss: float
    top1: float
    divergence: float


class Scorer:
    """Scores points on images that stay in memory, with the float model's logits."""

    def __init__(self, graph: Graph, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.replay, self.batches = Replay(graph), batches
        self.reference = [self._logits(images, QuantState()) for images, _ in batches]

    def _logits(self, images: Tensor, point: QuantState) -> Tensor:
        return self.replay.logits(self.replay.run(self.replay.start(images), 0, self.replay.end, point))

    @torch.inference_mode()
    def score(self, point: QuantState) -> Score:
        """The score of the model that rounds as `point` says."""
        meter, total = Meter(), 0.0
        for (images, labels), reference in zip(self.batches, self.reference, strict=True):
            logits = self._logits(images, point)
            meter.add(logits, labels)
            total += divergence(reference, logits)
        loss, top1, _ = meter.running
        return Score(loss, top1, total / meter.samples)
