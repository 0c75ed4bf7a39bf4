"""Top1, Top5, loss and their independence from batching."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from qlib.metrics import Meter, evaluate, evaluate_together, wilson_interval


def measured(logits: list[list[float]], labels: list[int]) -> Meter:
    meter = Meter()
    meter.add(torch.tensor(logits), torch.tensor(labels))
    return meter


@pytest.mark.parametrize(
    ("logits", "label", "prediction", "top1"),
    [
        pytest.param([1.0, 3.0, 2.0], 1, 1, 100.0, id="plain"),
        pytest.param([3.0, 3.0, 2.0], 0, 0, 100.0, id="a tie goes to the lower index"),
        pytest.param([3.0, 3.0, 2.0], 1, 0, 0.0, id="and not to the higher one"),
        pytest.param([0.0, 0.0, 0.0], 0, 0, 100.0, id="all equal"),
        pytest.param([0.0, 0.0, 0.0], 2, 0, 0.0, id="all equal, last label"),
        pytest.param([math.nan, 1.0, 0.0], 0, 1, 0.0, id="NaN is never a hit"),
        pytest.param([math.nan, math.nan, math.nan], 2, 0, 0.0, id="nothing but NaN"),
        pytest.param([-math.inf, 1.0, math.inf], 2, 2, 100.0, id="infinity"),
    ],
)
def test_prediction(logits: list[float], label: int, prediction: int, top1: float) -> None:
    result = measured([logits], [label]).result()
    assert (result.predictions.tolist(), result.top1) == ([prediction], top1)
    assert result.confusion[label, prediction] == 1
    assert int(result.confusion.sum()) == 1


@pytest.mark.parametrize(
    ("better", "equal_before", "equal_after", "top5"),
    [(4, 0, 0, 100.0), (5, 0, 0, 0.0), (3, 1, 3, 100.0), (4, 1, 0, 0.0), (0, 4, 5, 100.0), (0, 5, 0, 0.0)],
)
def test_top5_counts_ties_by_index(better: int, equal_before: int, equal_after: int, top5: float) -> None:
    logits = [2.0] * better + [1.0] * equal_before + [1.0] + [1.0] * equal_after + [0.0] * 3
    assert measured([logits], [better + equal_before]).result().top5 == top5


def test_loss_is_the_mean_over_samples_not_over_batches() -> None:
    logits, labels = torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    meter = Meter()
    meter.add(logits[:6], labels[:6])
    meter.add(logits[6:], labels[6:])
    expected = F.cross_entropy(logits.double(), labels).item()
    assert meter.result().loss == pytest.approx(expected, rel=1e-12)
    assert meter.running == (meter.result().loss, meter.result().top1, meter.result().top5)


def test_a_batch_mean_would_differ() -> None:
    meter = Meter()
    meter.add(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    meter.add(torch.tensor([[0.0, 9.0]]), torch.tensor([0]))
    losses = [math.log(2)] * 3 + [math.log(1 + math.exp(9))]
    assert meter.result().loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert meter.samples == 4


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_result_does_not_depend_on_batching(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randint(-4, 5, (100, 6), generator=generator).float(), torch.arange(100) % 6
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    whole, parts = evaluate(lambda x: x, [(images, labels)]), evaluate(lambda x: x, batches)
    assert (parts.top1, parts.top5, parts.loss, parts.samples) == (whole.top1, whole.top5, whole.loss, 100)
    assert torch.equal(parts.predictions, whole.predictions)
    assert torch.equal(parts.confusion, whole.confusion)


def test_confusion_is_label_by_prediction() -> None:
    result = measured([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0, 1, 1, 1]).result()
    assert result.confusion.tolist() == [[1, 0], [1, 2]]
    assert result.top1 == 75.0


def test_models_evaluated_together_read_the_data_once() -> None:
    reads = []

    def batches() -> list[tuple[Tensor, Tensor]]:
        reads.append(1)
        return [(torch.eye(3), torch.tensor([0, 1, 2]))]

    good, bad = evaluate_together([nn.Identity(), lambda x: -x], [Meter(), Meter()], batches())
    assert (good.top1, bad.top1, len(reads)) == (100.0, 0.0, 1)
    assert good.changed(bad) == 100.0
    assert good.changed(good) == 0.0


def test_gradients_are_not_kept() -> None:
    layer = nn.Linear(3, 2)
    result = evaluate(layer, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert not result.predictions.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("share", "samples", "low", "high"),
    [
        (0.92134, 1017, 90.32, 93.63),
        (0.5, 100, 40.38, 59.62),
        (0.0, 10, 0.0, 27.75),
        (1.0, 10, 72.25, 100.0),
        (0.6, 5, 23.07, 88.24),
    ],
)
def test_wilson_interval(share: float, samples: int, low: float, high: float) -> None:
    assert wilson_interval(share, samples) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


@pytest.mark.parametrize(("hits", "samples"), [(0, 1), (3, 7), (937, 1017), (50_000, 50_000)])
def test_wilson_interval_is_that_of_scipy(hits: int, samples: int) -> None:
    known = binomtest(hits, samples).proportion_ci(method="wilson")
    assert wilson_interval(hits / samples, samples) == pytest.approx((100 * known.low, 100 * known.high), rel=1e-12)


def test_interval_of_a_result() -> None:
    result = measured([[1.0, 0.0]] * 10, [0] * 6 + [1] * 4).result()
    low, high = result.top1_interval
    assert result.top1 == 60.0
    assert (low, high) == wilson_interval(0.6, 10)
    assert low < 60.0 < high
