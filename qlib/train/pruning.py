"""Pruners at work: when each is asked for masks, and how these act."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlib.checkpoint.fields import WEIGHTS, Record, Schema, shown
from qlib.config.schedule.types import PolicySpec
from qlib.errors import CheckpointError
from qlib.prune.pruner import Chosen, Moment, Pruner, Target
from qlib.train.masking import Masking, Mode
from qlib.train.policy import Batch, Policy
from qlib.train.saved import REMEDY
from qlib.values import whole

__all__ = ["Activations", "Factors", "Pruning"]

Activations = Callable[[Sequence[str]], Mapping[str, tuple[Tensor, Tensor]]]
"""Names of parameters -> for each channel behind the ReLU that follows, the share of zeros and the mean."""

Factors = Callable[[str], Tensor | None]
"""Name of a parameter -> what its batch-norm multiplies each output channel by; None where none follows."""


class Pruning(Policy):
    """A pruner in the epochs of its policy: it is asked when one begins, or every so many steps.

    Law: what it chooses follows from the weights, its memory and (seed, epoch, step).
    """

    def __init__(
        self,
        spec: PolicySpec,
        pruner: Pruner,
        names: Sequence[str],
        masking: Masking,
        *,
        seed: int = 0,
        steps: int = 1,
        factors: Factors = lambda name: None,
        activations: Activations = lambda names: {},
    ) -> None:
        self._spec, self._pruner, self._names, self._masking = spec, pruner, names, masking
        self._seed, self._steps, self._factors, self._activations = seed, steps, factors, activations
        self._pruned = -1
        self._memory: dict[str, Tensor] = {}

    def on_epoch_begin(self, epoch: int) -> None:
        if self._spec.active(epoch) and epoch != self._pruned:
            skipped = self._pruned < 0 and self._spec.args.get("skip_first_minibatch")
            self._pruned = epoch
            if not skipped:
                self._prune(epoch, 0)

    def on_minibatch_begin(self, batch: Batch) -> None:
        frequency = self._spec.args.get("mini_batch_pruning_frequency")
        if not isinstance(frequency, int) or not frequency or not batch.step or not self._spec.active(batch.epoch):
            return
        if (batch.epoch * self._steps + batch.step) % frequency == 0:
            self._prune(batch.epoch, batch.step)

    @torch.no_grad()
    def _prune(self, epoch: int, step: int) -> None:
        spec = self._spec
        random = zlib.crc32(repr((self._seed, epoch, step, spec.component.name)).encode())
        moment = Moment(epoch, spec.start, spec.end, spec.frequency, random)
        for name, chosen in self._pruner.choose(self._targets(), moment).items():
            self._masking.set(name, chosen.mask, self._mode(chosen))

    def _targets(self) -> list[Target]:
        pruner, masking = self._pruner, self._masking
        weights = {name: self._ranked(name) for name in self._names}
        for name, weight in weights.items():
            if name not in self._memory and (first := pruner.at_first(weight)) is not None:
                self._memory[name] = first
        with masking.deployed():
            activations = self._activations(self._names) if pruner.watches_activations else {}
        return [
            Target(name, weight, masking.kept(name), index, self._memory.get(name), activations.get(name))
            for index, (name, weight) in enumerate(weights.items())
        ]

    def _ranked(self, name: str) -> Tensor:
        """The weight, with what follows it folded in if that is asked for."""
        weight = self._masking.weight(name).detach()
        factors = self._factors(name) if self._spec.args.get("fold_batchnorm") else None
        return weight if factors is None else weight * factors.view(-1, *[1] * (weight.ndim - 1))

    def _mode(self, chosen: Chosen) -> Mode:
        args = self._spec.args
        double = bool(args.get("use_double_copies"))
        return Mode(
            forward_only=bool(args.get("mask_on_forward_only")),
            gradients=bool(args.get("mask_gradients")),
            double_copies=double,
            scale=chosen.scale if double else 1.0,
        )

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        for name in self._names if self._pruner.watches_gradients else ():
            gradient, weight = self._masking.gradient(name), self._masking.unmasked(name)
            if gradient is not None:
                now = self._pruner.after_backward(weight, gradient, self._memory.get(name))
                self._memory |= {} if now is None else {name: now}

    def on_minibatch_end(self, batch: Batch) -> None:
        if self._spec.args.get("discard_masks_at_minibatch_end") and self._spec.active(batch.epoch):
            for name in self._names:
                self._masking.drop(name)

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if self._spec.args.get("keep_mask") and self._spec.last == epoch:
            for name in self._names:
                self._masking.keep(name)

    @property
    def saved_fields(self) -> Schema:
        return Record({"pruned": whole(-1), "memory": WEIGHTS}, closed=True)

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self._pruned, "memory": dict(self._memory)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """What it remembers of each weight or filter is forgotten where these are others."""
        fitting = {name: value for name, value in state["memory"].items() if self._remembers(name, value)}
        self.load_state_dict({**state, "memory": fitting})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state["memory"].items():
            if not self._remembers(name, value):
                raise CheckpointError(
                    f"the pruner {self._spec.component.name!r} in the checkpoint remembers {shown(value)} of {name!r},"
                    f" which is not what it would; {REMEDY}"
                )
        self._pruned = state["pruned"]
        device = {name: self._masking.weight(name).device for name in state["memory"]}
        self._memory = {name: value.to(device[name]) for name, value in state["memory"].items()}

    @torch.no_grad()
    def _remembers(self, name: str, value: Tensor) -> bool:
        """Whether a value may be what the pruner remembers of a parameter."""
        if name not in self._names:
            return False
        weight = self._masking.weight(name).detach()
        own = self._pruner.at_first(weight)
        own = self._pruner.after_backward(weight, weight, None) if own is None else own
        same = own is not None and own.shape == value.shape and own.dtype == value.dtype
        return same and bool(torch.isfinite(value).all())
