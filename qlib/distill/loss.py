"""Knowledge distillation: a student that learns from what a trained teacher says of the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlib.checkpoint.fields import NAME, WEIGHTS, Record, Schema
from qlib.checkpoint.fingerprint import weights_hash
from qlib.checkpoint.fit import load_state
from qlib.distill.matching import Matching
from qlib.errors import CheckpointError
from qlib.train.policy import Batch, Losses, Policy

__all__ = ["DistillSettings", "Distillation", "distillation_loss"]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * mean_n sum_c p_t * log(p_t / p_s)``, where ``p = softmax(logits / T)`` of ``logits [N, C]``.

    A high temperature tells the student how alike the teacher finds the classes. Its gradient falls with ``1 / T^2``:
    the factor keeps the balance with a loss against the labels. For large T the loss is half the variance, over the
    classes, of the difference of the logits.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 2.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> round(distillation_loss(student, teacher, 1.0).item(), 4)  # 3/4 * log(3/2) + 1/4 * log(1/2)
    0.1308
    >>> round(distillation_loss(student, 2 * teacher, 2.0).item(), 4)  # 4 times as much
    0.5232
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class DistillSettings:
    """The weights of the losses against the teacher, the labels and, by `match_wt`, of the sum over matched layers."""

    temperature: float = 1.0
    distill_wt: float = 0.5
    student_wt: float = 0.5
    match_wt: float = 1.0


class Distillation(Policy):
    """Minimizes ``student_wt * objective + distill_wt * distillation + match_wt * matches`` in the active epochs.

    Outside of them nothing changes. What policies before this one have added is kept as it is. `Distill Loss` and
    `Match Loss` are reported without their weights.

    The teacher stays in evaluation mode, without gradients; it runs on the pixels that the student sees, or not at all
    where `cached` gives its logits of all training images. `own`: it is the student's original.

    Resuming is exact: a step depends on the batch, the student and the teacher, and the teacher does not change. A
    checkpoint holds the weights of an `own` teacher, since the student's are no longer those, and the hash of another
    one's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: DistillSettings,
        active: Callable[[int], bool],
        *,
        matching: Matching | None = None,
        cached: Callable[[], Tensor] | None = None,
        own: bool = False,
    ) -> None:
        assert matching is None or cached is None, "matching needs the teacher to run"
        self._teacher = teacher.eval().requires_grad_(False)
        self._settings, self._active, self.own = settings, active, own
        self._matching, self._cached = matching, cached
        self._logits: Tensor | None = None
        self._hash = ""

    def on_epoch_begin(self, epoch: int) -> None:
        if self._cached and self._logits is None and self._active(epoch):
            self._logits = self._cached()

    def on_minibatch_begin(self, batch: Batch) -> None:
        self.on_epoch_begin(batch.epoch)  # a run may be resumed within an epoch
        if self._matching and self._active(batch.epoch):
            self._matching.open()

    def before_backward(self, batch: Batch, logits: Tensor, losses: Losses) -> Losses:
        if not self._active(batch.epoch):
            return losses
        settings = self._settings
        distill = distillation_loss(logits.float(), self._teacher_logits(batch).float(), settings.temperature)
        added = losses.overall - losses.objective
        overall = settings.student_wt * losses.objective + settings.distill_wt * distill + added
        others = {**losses.others, "Distill Loss": distill.detach()}
        if self._matching:
            match = self._matching.close()
            overall = overall + settings.match_wt * match
            others["Match Loss"] = match.detach()
        return Losses(overall, losses.objective, others)

    def _teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits of a batch."""
        if self._logits is None:
            with torch.no_grad():  # not inference_mode, whose tensors the gradient could not use
                logits: Tensor = self._teacher(batch.images)
            return logits
        assert len(batch.indices) == len(batch.images), "the cache needs the index of each image"
        return self._logits[torch.as_tensor(batch.indices)].to(batch.images.device)

    @property
    def saved_fields(self) -> Schema:
        return Record({"teacher": NAME, "weights": WEIGHTS.or_null("or null")})

    def state_dict(self) -> dict[str, Any]:
        self._hash = self._hash or weights_hash(self._teacher.state_dict())
        weights = dict(self._teacher.state_dict()) if self.own else None
        return {"teacher": self._hash, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["weights"] is not None and self.own:
            load_state(self._teacher, state["weights"], "the teacher in the checkpoint")
        self._hash = weights_hash(self._teacher.state_dict())
        if self._hash != state["teacher"]:
            raise CheckpointError(
                "the checkpoint's run learned from a teacher with other weights; give the same teacher, or"
                " --reset-optimizer to begin a new run with this one"
            )
