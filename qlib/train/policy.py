"""What a schedule acts through: the moments of training at which a policy is called."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from qlib.checkpoint.fields import Record, Schema
from qlib.train.optimizers import ParameterGroup

__all__ = ["Batch", "Losses", "Policy"]


@dataclass(frozen=True, eq=False)
class Batch:
    """The images ``[N, C, H, W]`` and labels ``[N]`` of a step, and which images of the training set they are."""

    epoch: int
    step: int
    indices: Sequence[int]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Losses:
    """What is minimized, `overall`; the loss of the predictions alone, `objective`; and the `others`, by name.

    They need not add up: distillation weighs the objective.
    """

    overall: Tensor
    objective: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def plus(self, name: str, loss: Tensor) -> Losses:
        """With one more loss.

        >>> import torch
        >>> losses = Losses(torch.tensor(1.0), torch.tensor(1.0)).plus("L2", torch.tensor(0.5))
        >>> losses.overall.item(), losses.objective.item(), losses.others["L2"].item()
        (1.5, 1.0, 0.5)
        """
        return Losses(self.overall + loss, self.objective, {**self.others, name: loss.detach()})


class Policy:
    """A policy does something at some of these moments; by default, nothing.

    Law: `state_dict`, loaded into a policy made of the same schedule, makes it go on in the same way.
    """

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        """The groups of parameters that it needs of the optimizer, which begin empty."""
        return ()

    def use(self, optimizer: Optimizer, first: int) -> None:
        """Once, before training: the optimizer, in which its groups have the indices from `first` on."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before the first batch of an epoch; a resumed run comes here again only for epochs that it begins."""

    def on_minibatch_begin(self, batch: Batch) -> None:
        """Before the forward pass."""

    def before_backward(self, batch: Batch, logits: Tensor, losses: Losses) -> Losses:
        """After the forward pass; returns what to minimize."""
        return losses

    def before_optimizer_step(self) -> None:
        """When the gradients are there, before they are clipped."""

    def on_minibatch_end(self, batch: Batch) -> None:
        """When the weights have changed."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """After validation; `metrics` are its `loss`, `top1` and `top5`."""

    def deployed(self) -> AbstractContextManager[None]:
        """While it lasts, the weights are those that would be deployed: for validation and the test."""
        return contextlib.nullcontext()

    @property
    def saved_fields(self) -> Schema:
        """What `state_dict` holds: a checkpoint is held to it before it is taken over."""
        return Record({})

    def state_dict(self) -> dict[str, Any]:
        """The state, in tensors and plain values."""
        return {}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of the policy that it replaces, whose model had more channels."""
        self.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state."""
