"""Regularizers at work: their losses join what is minimized, and what has become small enough goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlib.config.schedule.types import PolicySpec
from qlib.regularize._base import Regularizer
from qlib.train.masking import Masking
from qlib.train.parts import Parts, part_of, parts_of
from qlib.train.policy import Batch, Losses, Policy

__all__ = ["Regularizing"]


class Regularizing(Policy):
    """A regularizer in the epochs of its policy.

    What it lets go is zero after each step, and may come back, unless it is lasting or `keep_mask` makes it a mask in
    the end.
    """

    def __init__(self, spec: PolicySpec, regularizer: Regularizer, names: Sequence[str], masking: Masking) -> None:
        self._spec, self._regularizer, self._masking = spec, regularizer, masking
        self._weights = {name: masking.weight(name) for name in names}
        self._gradients: dict[str, Tensor] = {}
        self._trained: Parts = {}

    def use(self, optimizer: Optimizer, first: int) -> None:
        self._trained = parts_of(self._weights, optimizer)

    def before_backward(self, batch: Batch, logits: Tensor, losses: Losses) -> Losses:
        if not self._spec.active(batch.epoch):
            return losses
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}
        with torch.autocast(batch.images.device.type, enabled=False):
            loss = self._regularizer.total(weights)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        self._gradients = dict(zip(weights, gradients, strict=True))
        return losses.plus(f"{self._spec.component.cls}_loss", loss.detach())

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        for name, gradient in self._gradients.items():
            for part in self._trained[name]:
                mine = part_of(gradient, self._weights[name], part)
                part.grad = mine.clone() if part.grad is None else part.grad.add_(mine)
        self._gradients.clear()

    @torch.no_grad()
    def on_minibatch_end(self, batch: Batch) -> None:
        if not self._spec.active(batch.epoch):
            return
        for name, mask in self._kept().items():
            if self._regularizer.lasting:
                self._keep(name, mask)
            else:
                self._weights[name].masked_fill_(~mask, 0.0)

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if self._spec.args.get("keep_mask") and self._spec.last == epoch:
            for name, mask in self._kept().items():
                self._keep(name, mask)

    def _keep(self, name: str, mask: Tensor) -> None:
        """Makes a mask last, beside the one that is there."""
        before = self._masking.kept(name)
        if not torch.equal(now := mask & before, before):
            self._masking.set(name, now)

    @torch.no_grad()
    def _kept(self) -> dict[str, Tensor]:
        return self._regularizer.masks(self._weights)
