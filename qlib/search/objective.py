"""The loss of a plan as a function of its ranges, computed anew only from the first range that moved."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.quant.plan import Plan
from qlib.search.minimize import Vector
from qlib.search.ranges import Coordinate, ends_of, factor, scaled
from qlib.search.replay import QuantState, Replay, Slot, State, grid_of
from qlib.search.sensitivity import divergence

__all__ = ["Objective"]

_log = logging.getLogger(__name__)
_EVERY = 20


class Objective:
    """Called with a value for each coordinate: the mean divergence from the float model's predictions.

    A search moves one coordinate for many evaluations: the state before the first coordinate that moved since the last
    evaluation is kept, and the next evaluation starts there if it moves that one or a later one. Values that give the
    same ranges are evaluated once.

    Law: the score depends on the values alone, not on what was evaluated before.
    """

    def __init__(
        self, graph: Graph, plan: Plan, coordinates: Sequence[Coordinate], batches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.replay, self.plan, self.coordinates = Replay(graph), plan, coordinates
        self.modules = {name_of(node): module for node, module in layers(graph)}
        self.positions = [min(self.replay.position(slot) for slot in each.slots) for each in coordinates]
        self.samples = sum(len(images) for images, _ in batches)
        self.starts = [self.replay.start(images) for images, _ in batches]
        self.reference = [self.replay.logits(self.replay.run(state, 0, self.replay.end)) for state in self.starts]
        self.point, self.at = QuantState.of(graph, plan), np.ones(len(coordinates))
        self.states: list[State] = self.starts
        self.position, self.state_at = 0, self.at
        self.scores: dict[bytes, float] = {}
        self.best, self.best_score = np.zeros(len(coordinates)), float("inf")
        self.calls = 0

    def __call__(self, values: Vector) -> float:
        factors = np.array([factor(float(value)) for value in values])
        key = factors.tobytes()
        if key not in self.scores:
            self.scores[key] = self._evaluate(values, factors)
            if self.scores[key] < self.best_score:
                self.best, self.best_score = np.array(values, dtype=np.float64), self.scores[key]
        self.calls += 1
        if self.calls % _EVERY == 0:
            _log.info("Iteration %d: Score=%.6f", self.calls, self.scores[key])
        return self.scores[key]

    @torch.inference_mode()
    def _evaluate(self, values: Vector, factors: Vector) -> float:
        changed = [i for i, (new, old) in enumerate(zip(factors, self.at, strict=True)) if new != old]
        self._move(values, changed)
        self.at = factors
        begin = min((self.positions[i] for i in changed), default=0)
        before = [i for i, position in enumerate(self.positions) if position < self.position]
        if self.position > begin or any(factors[i] != self.state_at[i] for i in before):
            self.states, self.position = self.starts, 0
        self.states = [self.replay.run(state, self.position, begin, self.point) for state in self.states]
        self.position, self.state_at = begin, factors
        total = 0.0
        for state, reference in zip(self.states, self.reference, strict=True):
            logits = self.replay.logits(self.replay.run(state, begin, self.replay.end, self.point))
            total += divergence(reference, logits)
        return total / self.samples if np.isfinite(total) else float("inf")

    def _move(self, values: Vector, changed: Sequence[int]) -> None:
        """Makes the grids of the coordinates that changed."""
        wanted: set[Slot] = {slot for i in changed for slot in self.coordinates[i].slots}
        for slot, (low, high) in ends_of(self.coordinates, values).items():
            if slot in wanted:
                grid = scaled(grid_of(self.plan.layers[slot[0]], slot), low, high)
                self.point = self.point.with_slot(slot, grid, self.modules[slot[0]])
