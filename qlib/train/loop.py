"""Training: epochs of steps, with the policies of a schedule called at their moments."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from qlib.config.flags.groups import TrainArgs
from qlib.data.loader import Loader
from qlib.progress import track
from qlib.train.optimizers import make_optimizer
from qlib.train.policy import Batch, Losses, Policy

__all__ = ["Diverged", "Progress", "Running", "StepSettings", "Trainee", "backward", "forward", "run_epoch"]

_log = logging.getLogger(__name__)


class Diverged(Exception):
    """The loss is no longer a number; says where."""


@dataclass
class Running:
    """Sums over the images of an epoch so far: losses by name, hits of Top1 and Top5, images."""

    sums: dict[str, float] = field(default_factory=dict)
    images: int = 0

    def add(self, losses: Losses, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        count = len(labels)
        best = logits.detach().topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        values = {
            "Overall Loss": losses.overall.detach() * count,
            "Objective Loss": losses.objective.detach() * count,
            **{name: loss.detach() * count for name, loss in losses.others.items()},
            "Top1": 100 * best[:, 0].sum(),
            "Top5": 100 * best.sum(),
        }
        stacked = torch.stack([value.double() for value in values.values()]).tolist()  # one wait for the device
        for name, value in zip(values, stacked, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.images += count

    @property
    def means(self) -> dict[str, float]:
        """The mean of each."""
        return {name: value / max(self.images, 1) for name, value in self.sums.items()}


@dataclass
class Progress:
    """How far a run has come: `epoch` is under way, `steps` of it are done; what they summed up to."""

    epoch: int = 0
    steps: int = 0
    running: Running = field(default_factory=Running)


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken: what it depends on besides the trainee and the images."""

    batch_size: int
    seed: int
    print_freq: int
    label_smoothing: float = 0.0
    grad_clip: float | None = None
    amp: bool = False


@dataclass(frozen=True, eq=False)
class Trainee:
    """What trains: the model that is called, the optimizer of its parameters, and the policies that act on both."""

    model: nn.Module
    optimizer: Optimizer
    policies: Sequence[Policy]

    @classmethod
    def of(
        cls, args: TrainArgs, model: nn.Module, weights: Sequence[nn.Parameter], policies: Sequence[Policy]
    ) -> Trainee:
        """With the optimizer of the flags: group 0 holds the `weights`, behind it are the groups of the policies."""
        optimizer = make_optimizer(args, weights, [group for policy in policies for group in policy.groups])
        first = 1
        for policy in policies:
            policy.use(optimizer, first)
            first += len(policy.groups)
        return cls(model, optimizer, policies)

    def begin(self, epoch: int) -> None:
        """The beginning of an epoch, or of what is left of one."""
        self.model.train()
        for policy in self.policies:
            policy.on_epoch_begin(epoch)

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """While it lasts, the weights are those that would be deployed."""
        with contextlib.ExitStack() as stack:
            for policy in self.policies:
                stack.enter_context(policy.deployed())
            yield

    @property
    def lr(self) -> float:
        """The learning rate of the weights."""
        return self.rates[0]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group of parameters, that of the weights first."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


def run_epoch(
    trainee: Trainee,
    loader: Loader,
    progress: Progress,
    settings: StepSettings,
    device: torch.device,
    after_step: Callable[[], None],
) -> None:
    """The steps of the epoch that `progress` tells, from the one it stands at on.

    Law: what a step does depends on the weights, the optimizer, the policies and (seed, epoch, step), and on nothing
    that was computed before: a run that is resumed at a step goes on as if it had not been interrupted.

    Raises Diverged when the loss is NaN or infinite, or a learning rate beyond float32; the weights are then those of
    the step before.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp)
    done, start = progress.steps, time.monotonic()

    def fields() -> Mapping[str, float]:
        elapsed = (time.monotonic() - start) / max(progress.steps - done, 1)
        return {**progress.running.means, "LR": trainee.lr, "Time": elapsed}

    batches = track(
        _batches(loader, progress, settings, device),
        total_images=len(loader.indices),
        batch_size=settings.batch_size,
        description=f"Epoch: [{progress.epoch}]",
        print_freq=settings.print_freq,
        fields=fields,
        count=lambda batch: len(batch.labels),
        images_done=min(progress.steps * settings.batch_size, len(loader.indices)),
    )
    for batch in batches:
        torch.manual_seed(_mixed(settings.seed, batch.epoch, batch.step))
        losses = forward(trainee, batch, settings, progress.running)
        if not math.isfinite(progress.running.sums["Overall Loss"]):
            steps = -(-len(loader.indices) // settings.batch_size)
            raise Diverged(
                f"the loss is {losses.overall.item()} in epoch {batch.epoch}, step {batch.step + 1} of {steps}"
            )
        if rate := next((rate for rate in trainee.rates if abs(rate) > torch.finfo(torch.float32).max), None):
            raise Diverged(f"the learning rate is {rate:g} in epoch {batch.epoch}, which no weight can follow")
        backward(trainee, batch, losses, settings, scaler)
        progress.steps = batch.step + 1
        after_step()


def forward(trainee: Trainee, batch: Batch, settings: StepSettings, running: Running) -> Losses:
    """What is to be minimized on a batch, which is added to the sums."""
    for policy in trainee.policies:
        policy.on_minibatch_begin(batch)
    with torch.autocast(batch.images.device.type, enabled=settings.amp):
        logits = trainee.model(batch.images)
        objective = F.cross_entropy(logits.float(), batch.labels, label_smoothing=settings.label_smoothing)
        losses = Losses(objective, objective)
        for policy in trainee.policies:
            losses = policy.before_backward(batch, logits, losses)
    running.add(losses, logits, batch.labels)
    return losses


def backward(
    trainee: Trainee, batch: Batch, losses: Losses, settings: StepSettings, scaler: torch.amp.GradScaler
) -> None:
    """Gradients, a step of the optimizer against them, and the end of the batch."""
    optimizer = trainee.optimizer
    optimizer.zero_grad()
    scaler.scale(losses.overall).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    for policy in trainee.policies:
        policy.before_optimizer_step()
    if settings.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(_parameters(optimizer), settings.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    for policy in trainee.policies:
        policy.on_minibatch_end(batch)


def _batches(loader: Loader, progress: Progress, settings: StepSettings, device: torch.device) -> Iterator[Batch]:
    """The batches that are left of an epoch; one image alone, which batch-norms cannot take, is left out."""
    size = settings.batch_size
    done = progress.steps
    left = loader.indices[done * size :]
    for step, (images, labels) in enumerate(replace(loader, indices=left) if left else (), done):
        indices = loader.indices[step * size : (step + 1) * size]
        if len(labels) == 1 and size > 1:
            continue
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        yield Batch(progress.epoch, step, indices, images, labels.to(device, non_blocking=True))


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
