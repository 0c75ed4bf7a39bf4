"""Evaluation of models on a job's images, with the lines that people grep for."""

from __future__ import annotations

import logging

from qlib.app.images import report_skipped
from qlib.app.job import Job
from qlib.data.loader import Loader
from qlib.lower import exact_arithmetic
from qlib.metrics import Evaluation, Meter, Model, evaluate_together
from qlib.progress import track

__all__ = ["measure", "log_confusion", "log_interval", "log_result"]

_log = logging.getLogger(__name__)


def measure(job: Job, loader: Loader, description: str, *models: Model) -> list[Evaluation]:
    """Evaluates the models on the same images, read once; what is logged is of the first one."""
    config, meters = job.config, [Meter() for _ in models]
    _log.info("%d samples (%d per mini-batch)", loader.total_images, config.batch_size)

    def fields() -> dict[str, float]:
        return dict(zip(("Loss", "Top1", "Top5"), meters[0].running, strict=True))

    batches = track(
        loader,
        total_images=loader.total_images,
        batch_size=config.batch_size,
        description=description,
        print_freq=config.print_freq,
        fields=fields,
    )
    with exact_arithmetic():
        results = evaluate_together(models, meters, batches, job.device)
    report_skipped(loader)
    return results


def log_result(result: Evaluation) -> None:
    """The line of an evaluation."""
    _log.info("==> Top1: %.3f    Top5: %.3f    Loss: %.3f\n", result.top1, result.top5, result.loss)


def log_interval(result: Evaluation) -> None:
    """The interval of Top1, and the loss to more digits."""
    low, high = result.top1_interval
    _log.info("Top1 95 %% interval: %.2f to %.2f (%d images), Loss %.5f", low, high, result.samples, result.loss)


def log_confusion(result: Evaluation) -> None:
    """The matrix: row i counts the images of class i by the class that was predicted."""
    rows = (" ".join(f"{count:5d}" for count in row) for row in result.confusion.tolist())
    _log.info("==> Confusion:\n%s\n", "\n".join(rows))
