"""What a test found, for the report: results, how predictions changed, and the images in which they did."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from qlib.app.job import Job
from qlib.app.predictions import image_names
from qlib.app.report import record
from qlib.data.datasets import ImageDataset
from qlib.data.loader import Loader
from qlib.metrics import Comparison, Evaluation, compare
from qlib.report.record import ChangedImage, Confusion, Predicted, Result, Versus

__all__ = ["record_test", "record_versus"]

_MOST_CHANGED, _MOST_COUNTS = 24, 2000
_SIDE = 48


def record_test(job: Job, loader: Loader, results: Mapping[str, Evaluation]) -> None:
    """Hands over the results of models on the test images, by name; the first is what the run is about."""
    if job.config.no_report:
        return
    names, (first, *others) = image_names(job, loader), results
    record(
        job,
        results=tuple(_result(name, each) for name, each in results.items()),
        tested=_tested(loader, names, results),
        confusion=tuple(_confusion(name, each) for name, each in results.items()),
        versus=(),
    )
    for other in others:
        record_versus(job, loader, compare(results[other].predictions, results[first]), first, other)
    if others:
        record(job, changed=_changed(loader.dataset, names, results[others[0]], results[first]))


def record_versus(job: Job, loader: Loader, comparison: Comparison, model: str, other: str) -> None:
    """Hands over one more comparison of two models, or of two runs, on the same images."""
    flips = {loader.dataset.classes[index]: count for index, count in enumerate(comparison.flips) if count}
    versus = Versus(
        model,
        other,
        comparison.samples,
        comparison.agreement,
        *comparison.agreement_interval,
        comparison.lost,
        comparison.won,
        comparison.p_value,
        flips,
    )
    record(job, versus=(*job.run.found.get("versus", ()), versus))


def _result(name: str, each: Evaluation) -> Result:
    return Result(name, each.samples, each.top1, *each.top1_interval, each.top5, each.loss)


def _tested(loader: Loader, names: Mapping[str, int], results: Mapping[str, Evaluation]) -> Predicted:
    labels = next(iter(results.values())).labels.tolist()
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{label} {name}\n".encode(errors="backslashreplace"))
    predictions = {name: tuple(each.predictions.tolist()) for name, each in results.items()}
    return Predicted(
        digest.hexdigest()[:16], tuple(map(_printable, loader.dataset.classes)), tuple(labels), predictions
    )


def _printable(name: str) -> str:
    """A name of the file system, which may not be UTF-8, as text that is."""
    return name.encode(errors="backslashreplace").decode()


def _confusion(name: str, each: Evaluation) -> Confusion:
    matrix = each.confusion
    pairs = matrix.nonzero()
    rows = sorted(((*pair, int(matrix[tuple(pair)])) for pair in pairs.tolist()), key=lambda row: -row[2])
    return Confusion(name, tuple(rows[:_MOST_COUNTS]), max(0, len(rows) - _MOST_COUNTS))


def _changed(
    dataset: ImageDataset, names: Mapping[str, int], before: Evaluation, after: Evaluation
) -> tuple[ChangedImage, ...]:
    """The images whose prediction changed, those first of which the model before was surest."""
    places = (before.predictions != after.predictions).nonzero().flatten()
    order = places[before.margins[places].argsort(descending=True, stable=True)][:_MOST_CHANGED].tolist()
    listed: Sequence[tuple[str, int]] = list(names.items())
    return tuple(
        ChangedImage(
            _printable(listed[place][0]),
            int(after.labels[place]),
            int(before.predictions[place]),
            int(after.predictions[place]),
            _rounded(before.margins[place]),
            _rounded(after.margins[place]),
            _thumbnail(dataset, listed[place][1]),
        )
        for place in order
    )


def _rounded(margin: torch.Tensor) -> float:
    return round(float(margin), 4)


def _thumbnail(dataset: ImageDataset, index: int) -> str:
    """The image as JPEG in base64, no side above 48; empty where it cannot be read any more."""
    try:
        image = dataset.images.read(index)
    except Exception:  # decoders raise anything; it was readable a moment ago, and the report does without
        return ""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode()
