"""Masks at work in training: what is pruned stays zero, through gradients, steps and momentum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlib.checkpoint.fields import NAME, NUMBER, Each, Named, Record, Schema
from qlib.errors import ModelError
from qlib.prune.masks import Masks, parameters_by_name, unmasked
from qlib.train.parts import Parts, gradient_of, laid_out, part_of, parts_of
from qlib.train.policy import Batch, Policy

__all__ = ["LASTING", "Masking", "Mode"]


@dataclass(frozen=True)
class Mode:
    """How a mask acts.

    Without `forward_only`, weights, gradients and momentum are masked. With it only the forward pass is: the step moves
    the weights that were masked, from zero on, or, with `double_copies`, from where they were; `gradients` masks what
    moves them. `scale` multiplies the weights that are kept, where there are double copies.
    """

    forward_only: bool = False
    gradients: bool = False
    double_copies: bool = False
    scale: float = 1.0

    @property
    def lasting(self) -> bool:
        """Whether the weights themselves are masked."""
        return not (self.forward_only or self.double_copies)


LASTING = Mode()

_FLAGS = ("forward_only", "gradients", "double_copies")


class Masking(Policy):
    """The masks of a model: pruners set them, and it applies them; it acts after all pruners.

    Laws: after each step what a lasting mask does not keep is zero, whatever the optimizer is; where a mask changes,
    the optimizer forgets what it kept of the weights that died and of those that came back.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model = model
        self._parameters = parameters_by_name(model)
        self.masks: Masks = {name: laid_out(mask, self._parameters[name]) for name, mask in masks.items()}
        self._modes: dict[str, Mode] = dict.fromkeys(masks, LASTING)
        self._unmasked: dict[str, Tensor] = {}
        self._trained: Parts = {}
        self._optimizer: Optimizer | None = None

    def use(self, optimizer: Optimizer, first: int) -> None:
        self._optimizer = optimizer
        self._trained = parts_of(self._parameters, optimizer)

    def weight(self, name: str) -> nn.Parameter:
        """A parameter of the model by its name."""
        return self._parameters[name]

    def kept(self, name: str) -> Tensor:
        """The mask of a parameter: one that keeps all where there is none."""
        weight = self._parameters[name]
        return self.masks[name] if name in self.masks else torch.ones_like(weight, dtype=torch.bool)

    def unmasked(self, name: str) -> Tensor:
        """A weight as the step will move it, also while a mask of the forward pass is on it."""
        return self._unmasked.get(name, self._parameters[name].detach())

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a parameter; None before the first backward pass."""
        return gradient_of(self._parameters[name].detach(), self._trained[name])

    @torch.no_grad()
    def set(self, name: str, mask: Tensor, mode: Mode = LASTING) -> None:
        """Gives a parameter a mask, which acts at once if it is lasting."""
        before, weight = self.kept(name), self._parameters[name]
        mask = laid_out(mask, weight)
        self.masks[name], self._modes[name] = mask, mode
        if mode.lasting:
            weight.masked_fill_(~mask, 0.0)
            self._forget(name, mask != before)

    def drop(self, name: str) -> None:
        """Forgets the mask of a parameter."""
        self.masks.pop(name, None)
        self._modes.pop(name, None)

    def keep(self, name: str) -> None:
        """Makes the mask of a parameter, if there is one, lasting."""
        if name in self.masks and not self._modes[name].lasting:
            self.set(name, self.masks[name])

    def _forget(self, name: str, changed: Tensor) -> None:
        """Zeroes what the optimizer keeps of the weights whose fate has changed."""
        if self._optimizer is None or not bool(changed.any()):
            return
        for part in self._trained[name]:
            mine = part_of(changed, self._parameters[name], part)
            for kept in self._optimizer.state.get(part, {}).values():
                if isinstance(kept, Tensor) and kept.shape == part.shape:
                    kept.masked_fill_(mine, 0.0)

    @torch.no_grad()
    def on_epoch_begin(self, epoch: int) -> None:
        for name, mask in self.masks.items():
            if self._modes[name].lasting:
                self._parameters[name].masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def on_minibatch_begin(self, batch: Batch) -> None:
        for name, mode in self._modes.items():
            if not mode.lasting:
                self._mask_for_now(name, mode)

    def _mask_for_now(self, name: str, mode: Mode) -> None:
        weight = self._parameters[name]
        if mode.double_copies:
            self._unmasked[name] = weight.detach().clone()
            weight.mul_(mode.scale)
        weight.masked_fill_(~self.masks[name], 0.0)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        self._restore()
        for name, mode in self._modes.items():
            if mode.lasting or mode.gradients:
                for part in self._trained[name]:
                    if part.grad is not None:
                        part.grad.masked_fill_(part_of(~self.masks[name], self._parameters[name], part), 0.0)

    def _restore(self) -> None:
        for name, weight in self._unmasked.items():
            self._parameters[name].copy_(weight)
        self._unmasked.clear()

    @torch.no_grad()
    def on_minibatch_end(self, batch: Batch) -> None:
        self.on_epoch_begin(batch.epoch)

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        passing = [name for name, mode in self._modes.items() if not mode.lasting]
        own = {name: self._parameters[name].detach().clone() for name in passing}
        with torch.no_grad():
            for name in passing:
                self._parameters[name].masked_fill_(~self.masks[name], 0.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in own.items():
                    self._parameters[name].copy_(weight)

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        lasting = {name: mask for name, mask in self.masks.items() if self._modes[name].lasting}
        for name, count in unmasked(self._model, lasting).items():
            raise ModelError(
                f"{count:,} weights of {name!r} that were pruned are not zero after epoch {epoch}: something else"
                " writes to them; leave this parameter out of the pruners' weights"
            )

    @property
    def saved_fields(self) -> Schema:
        return Record({**{flag: Each(NAME) for flag in _FLAGS}, "scale": Named(NUMBER)}, closed=True)

    def state_dict(self) -> dict[str, Any]:
        flags = {flag: [name for name, mode in self._modes.items() if getattr(mode, flag)] for flag in _FLAGS}
        return {**flags, "scale": {name: mode.scale for name, mode in self._modes.items() if mode.scale != 1}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.masks:
            flags = {flag: name in state[flag] for flag in _FLAGS}
            self._modes[name] = Mode(**flags, scale=state["scale"].get(name, 1.0))
