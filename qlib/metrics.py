"""Top1, Top5 and loss of a model on a dataset, and how a quantized model agrees with its float original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Comparison",
    "Evaluation",
    "Meter",
    "Model",
    "compare",
    "evaluate",
    "evaluate_together",
    "mcnemar",
    "score_sums",
    "wilson_interval",
]

Model: TypeAlias = Callable[[Tensor], Tensor]
"""What is evaluated: from images ``[N, C, H, W]`` to logits ``[N, classes]``."""

MICRO_BATCH = 32
"""Images in one forward pass: activations of more would leave the cache between one layer and the next."""

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Evaluation:
    """The result over `samples` images: shares in percent, the mean loss over samples, each prediction and label.

    `margins`: for each image the probability of the predicted class less that of the next one, 0 for a single class.
    """

    samples: int
    top1: float
    top5: float
    loss: float
    predictions: Tensor
    labels: Tensor
    classes: int
    margins: Tensor

    @property
    def confusion(self) -> Tensor:
        """``[classes, classes]``: element (i, j) counts the images of class i that are predicted as class j."""
        pairs = torch.bincount(self.labels * self.classes + self.predictions, minlength=self.classes**2)
        return pairs.view(self.classes, self.classes)

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of Top1, in percent."""
        return wilson_interval(self.top1 / 100, self.samples)

    def changed(self, other: Evaluation) -> float:
        """The share of images, in percent, that the two predict differently."""
        assert self.samples == other.samples
        return 100 * float((self.predictions != other.predictions).double().mean())


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """The 95 % interval, in percent, of a share measured on `samples` items (Wilson 1927).

    `scipy.stats.binomtest(...).proportion_ci(method="wilson")` is the same, but a second or two to import.

    >>> [round(bound, 2) for bound in wilson_interval(0.92134, 1017)]
    [90.32, 93.63]
    """
    z2 = _Z_95**2 / samples
    center = (share + z2 / 2) / (1 + z2)
    half = _Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


@dataclass(frozen=True)
class Comparison:
    """How the predictions of a model changed against another's on the same images.

    `lost`: images that only the other one predicts right; `won`: those that only this one does; `flips[i]`: the images
    of class i whose prediction changed, right or wrong.
    """

    samples: int
    lost: int
    won: int
    flips: tuple[int, ...]

    @property
    def agreement(self) -> float:
        """The share of images, in percent, with the same prediction."""
        return 100 * (1 - sum(self.flips) / self.samples)

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the agreement, in percent."""
        return wilson_interval(self.agreement / 100, self.samples)

    @property
    def p_value(self) -> float:
        """McNemar's: how likely so unequal losses and gains are where both models are right equally often."""
        return mcnemar(self.lost, self.won)


def compare(other: Tensor, this: Evaluation) -> Comparison:
    """What changed from the predictions ``[N]`` of another model for the same images."""
    assert len(other) == this.samples
    before, after = other == this.labels, this.predictions == this.labels
    flips = torch.bincount(this.labels[other != this.predictions], minlength=this.classes)
    return Comparison(this.samples, int((before & ~after).sum()), int((after & ~before).sum()), tuple(flips.tolist()))


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): each of the ``lost + won`` images was a fair coin.

    >>> mcnemar(1, 7)  # 2 * (1 + 8) / 2**8
    0.0703125
    >>> mcnemar(5, 5), mcnemar(0, 0)
    (1.0, 1.0)
    """
    n, ways, tail = lost + won, 1, 0
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))


class Meter:
    """Accumulates predictions, ranks and losses of batches; per-sample losses are summed exactly, in order.

    So the result does not depend on how the images are batched.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._ranks: list[Tensor] = []
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._margins: list[Tensor] = []
        self._classes = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds ``logits [N, C]`` and ``labels [N]``. Equal logits rank by index: the lower one first."""
        logits, labels = logits.detach().float().cpu(), labels.cpu()
        self._classes = logits.shape[1]
        ranks, scores = _ranks(logits, labels)
        index = torch.arange(self._classes)
        # argmax would do, but torch leaves open which of equal values it returns
        best = (scores == scores.amax(1, keepdim=True)) * (self._classes - index)
        self._ranks.append(ranks)
        self._predictions.append(self._classes - best.amax(1))
        self._labels.append(labels)
        self._margins.append(_margins(logits))
        self._losses += F.cross_entropy(logits.double(), labels, reduction="none").tolist()

    @property
    def samples(self) -> int:
        """How many images were added."""
        return len(self._losses)

    @property
    def running(self) -> tuple[float, float, float]:
        """Mean loss, Top1 and Top5 so far."""
        ranks = torch.cat(self._ranks)
        return math.fsum(self._losses) / self.samples, _percent(ranks < 1), _percent(ranks < 5)

    def result(self) -> Evaluation:
        """The evaluation of all that was added; at least one image."""
        loss, top1, top5 = self.running
        predictions, labels = torch.cat(self._predictions), torch.cat(self._labels)
        return Evaluation(self.samples, top1, top5, loss, predictions, labels, self._classes, torch.cat(self._margins))


def _margins(logits: Tensor) -> Tensor:
    """The largest probability ``[N]`` less the next one, of logits ``[N, C]``.

    >>> _margins(torch.tensor([[0.0, 1.0986123]]))  # 1/4 and 3/4
    tensor([0.5000])
    """
    first, *others = logits.softmax(1).topk(min(2, logits.shape[1])).values.unbind(1)
    return first - others[0] if others else torch.zeros_like(first)


def _ranks(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many classes come before the own one ``[N]``, of equal ones the first; and the scores ``[N, C]``."""
    scores = torch.where(logits.isnan(), -math.inf, logits)  # NaN must not count as a hit
    own = scores.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1])
    before = (scores > own) | ((scores == own) & (index < labels[:, None])) | (own == -math.inf)
    return before.sum(1), scores


def score_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses, and how many labels are the first class, and among the first five: float64 ``[3]``.

    >>> score_sums(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    tensor([1.3863, 1.0000, 2.0000], dtype=torch.float64)
    """
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    ranks, _ = _ranks(logits, labels)
    loss = math.fsum(F.cross_entropy(logits.double(), labels, reduction="none").tolist())
    return torch.tensor([loss, int((ranks < 1).sum()), int((ranks < 5).sum())], dtype=torch.float64)


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


def evaluate(
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Runs the model over all batches of ``(images, labels)``."""
    (result,) = evaluate_together([model], [Meter()], batches, device)
    return result


@torch.inference_mode()
def evaluate_together(
    models: Sequence[Model],
    meters: Sequence[Meter],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
) -> list[Evaluation]:
    """Runs every model over the same batches, read once; each fills its own meter."""
    for images, labels in batches:
        images = images.to(device)
        for model, meter in zip(models, meters, strict=True):
            meter.add(torch.cat([model(part) for part in torch.split(images, MICRO_BATCH)]), labels)
    return [meter.result() for meter in meters]
