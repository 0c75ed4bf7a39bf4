"""Training checkpoints: all that a run needs to go on as if it had never stopped, and what it would deploy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlib.checkpoint.fields import check_fields, shown
from qlib.checkpoint.fingerprint import content_hash
from qlib.checkpoint.masks import saved_masks
from qlib.checkpoint.write import write_checkpoint
from qlib.errors import CheckpointError
from qlib.files import move
from qlib.tensor_file import flushed
from qlib.train.best import EpochScore
from qlib.train.loop import Diverged, Progress, Running, Trainee
from qlib.train.saved import REMEDY, check_optimizer, check_training

__all__ = ["BEST", "LAST", "Checkpoints", "TrainingState", "is_training"]

_log = logging.getLogger(__name__)

LAST, BEST, _NEW = "checkpoint.pth.tar", "best.pth.tar", "checkpoint.new.pth.tar"

_FORMAT, _VERSION = "qlib_training", 1
_HASH = "hash"
_NOT_TAKEN_OVER = {_HASH, "quantized", "extras"}  # the integers have a hash of their own


def is_training(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that was read is one of a run of training.

    >>> is_training({"state_dict": {}})
    False
    """
    return checkpoint.get("format") == _FORMAT


@dataclass
class TrainingState:
    """Everything that changes while a run trains. Random numbers do not: they follow from seed, epoch and step."""

    weights: nn.Module
    trainee: Trainee
    progress: Progress
    best: list[EpochScore]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, header: Mapping[str, Any], quantized: Mapping[str, Any] | None) -> None:
        """Writes the checkpoint, whole or not at all.

        `header` names the model; `quantized` is the checkpoint of the integer model, where there is one. Raises
        OutputError.
        """
        progress = self.progress
        checkpoint = {
            "format": _FORMAT,
            "version": _VERSION,
            **header,
            "epoch": progress.epoch - 1,  # the last one that was finished, as people's scripts expect
            "steps": progress.steps,
            "running": {"sums": progress.running.sums, "images": progress.running.images},
            "state_dict": flushed(self.weights.state_dict()),
            **saved_masks(self.masks),
            "optimizer_state_dict": self.trainee.optimizer.state_dict(),
            "optimizer_type": type(self.trainee.optimizer).__name__,
            "policies": [policy.state_dict() for policy in self.trainee.policies],
            "best": [score.plain() for score in self.best],
            "quantized": quantized,
        }
        write_checkpoint(path, {**checkpoint, _HASH: _content_hash(checkpoint)})

    def load(self, checkpoint: Mapping[str, Any], source: str, steps_per_epoch: int) -> None:
        """Takes over a checkpoint for which `is_training` holds, but for the weights, which the model has already.

        Raises CheckpointError where it is damaged, was changed, or is of another optimizer or schedule.
        """
        if checkpoint.get("version") != _VERSION:
            version = shown(checkpoint.get("version"))
            raise CheckpointError(f"{source} is of version {version}, not {_VERSION}; train it again")
        check_training(checkpoint, steps_per_epoch, source)
        if _HASH in checkpoint and checkpoint[_HASH] != _content_hash(checkpoint):
            raise CheckpointError(f"{source} was changed after it was written; {REMEDY}")
        optimizer, policies = self.trainee.optimizer, self.trainee.policies
        kind = type(optimizer).__name__
        if checkpoint["optimizer_type"] != kind:
            raise CheckpointError(
                f"{source} was trained with {checkpoint['optimizer_type']}, not {kind}; give the same --optimizer, or"
                " --reset-optimizer to begin a new run with its weights"
            )
        if len(checkpoint["policies"]) != len(policies):
            raise CheckpointError(
                f"{source} was trained under a schedule of {len(checkpoint['policies'])} policies, not"
                f" {len(policies)}; give the same --compress and --kd flags, or --reset-optimizer to begin a new"
                " run with its weights"
            )
        try:
            for index, (policy, saved) in enumerate(zip(policies, checkpoint["policies"], strict=True)):
                check_fields(saved, policy.saved_fields, f"{source}, policy {index} of its schedule,", REMEDY)
                policy.load_state_dict(saved)
            check_optimizer(checkpoint["optimizer_state_dict"], optimizer, source)
            optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{source} was trained under another schedule ({reason}); give the same --compress, or"
                " --reset-optimizer to begin a new run with its weights"
            ) from error
        self.progress.epoch, self.progress.steps = checkpoint["epoch"] + 1, checkpoint["steps"]
        self.progress.running = Running(dict(checkpoint["running"]["sums"]), checkpoint["running"]["images"])
        self.best[:] = [EpochScore(**each) for each in checkpoint["best"]]


def _content_hash(checkpoint: Mapping[str, Any]) -> str:
    """That of all that a run takes over."""
    return content_hash({key: value for key, value in checkpoint.items() if key not in _NOT_TAKEN_OVER})


class Checkpoints:
    """The checkpoint files of a run: `file` gives their paths by name, `header` names the model.

    Law: a training step could use what the last one holds. What is saved within an epoch, about `every` so many
    seconds, counts when the next step has found its loss to be a number; until then it stands beside the one before.
    """

    def __init__(
        self, state: TrainingState, file: Callable[[str], Path], header: Mapping[str, Any], every: float
    ) -> None:
        self._state, self._file, self._header, self._every = state, file, header, every
        self._saved = time.monotonic()

    @property
    def last(self) -> Path:
        """The last one that counts."""
        return self._file(LAST)

    def save(self, name: str, quantized: Mapping[str, Any] | None = None) -> None:
        """Writes one now. Raises OutputError."""
        path, best = self._file(name), self._state.best
        extras = {"best_top1": best[0].top1, "best_epoch": best[0].epoch} if best else {}
        self._state.save(path, {**self._header, "extras": extras}, quantized)
        self._saved = time.monotonic()
        if quantized is not None or self._state.progress.steps == 0:
            _log.info("Saving checkpoint to: %s", path)

    def after_step(self) -> None:
        """To be called after each step whose loss was a number. Raises Diverged before it would save NaN."""
        if self._file(_NEW).exists():
            move(self._file(_NEW), self.last, "checkpoint")
        if time.monotonic() - self._saved >= self._every:
            self.check_weights(f"step {self._state.progress.steps} of epoch {self._state.progress.epoch}")
            self.save(_NEW)

    def discard_new(self) -> None:
        """Removes the one that does not count yet."""
        self._file(_NEW).unlink(missing_ok=True)

    def check_weights(self, when: str) -> None:
        """Raises Diverged for NaN or infinity."""
        for name, value in self._state.weights.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise Diverged(f"{name} holds NaN or infinity after {when}")
