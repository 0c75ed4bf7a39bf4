"""What each image was predicted as: `predictions.csv` of a run, and what changed against another evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qlib.app.job import Job
from qlib.data.loader import Loader
from qlib.errors import DataError
from qlib.files import read_csv, write_csv
from qlib.metrics import Comparison, Evaluation, compare

__all__ = ["compare_to_run", "comparison_row", "image_names", "log_comparison", "save_predictions"]

_log = logging.getLogger(__name__)

_FILE = "predictions.csv"
_KNOWN = ("image", "label")
_MOST_CHANGED = 5


def save_predictions(job: Job, loader: Loader, results: Mapping[str, Evaluation]) -> None:
    """Writes a row for each image of the pass: its path, its label, and what each model predicts."""
    first = next(iter(results.values()))
    columns = (first.labels, *(each.predictions for each in results.values()))
    rows = zip(image_names(job, loader), *(column.tolist() for column in columns), strict=True)
    write_csv(job.run.folder / _FILE, (*_KNOWN, *results), rows)


def compare_to_run(job: Job, loader: Loader, this: Evaluation, run: Path) -> Comparison:
    """What changed against the integer model of another run, or its pruned or float model if it has no other.

    Raises:
        DataError: the run has no predictions that can be read, or they are of other images.
    """
    path = run / _FILE if run.is_dir() else run
    images, labels, predictions = _read(path)
    if images != list(image_names(job, loader)) or labels != this.labels.tolist():
        raise DataError(
            f"the run in {str(run)!r} looked at {len(images)} images and this one at {this.samples}, which are not the"
            " same; --compare-to needs the same data, --effective-test-size and --seed"
        )
    return compare(torch.tensor(predictions), this)


def image_names(job: Job, loader: Loader) -> dict[str, int]:
    """Each image of the pass, by its path in the dataset's folder -> its number there."""
    root = "" if job.config.data is None else f"{job.config.data}{os.sep}"
    left_out = set(loader.skipped)
    paths = [(loader.dataset.path(index), index) for index in loader.indices]
    return {path.removeprefix(root): index for path, index in paths if path not in left_out}


def _read(path: Path) -> tuple[list[str], list[int], list[int]]:
    """Images, labels and predictions."""
    try:
        rows = read_csv(path)
        model = next(each for each in ("quantized", "pruned", "fp32") if each in rows[0])
        return (
            [row["image"] for row in rows],
            [int(row["label"]) for row in rows],
            [_class(row[model]) for row in rows],
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no table of predictions"
        raise DataError(
            f"--compare-to {str(path)!r} cannot be read ({reason}); give the folder of a run that evaluated a model"
        ) from error


def _class(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**31:
        raise ValueError(text)
    return number


def log_comparison(comparison: Comparison, other: str, classes: Sequence[str]) -> None:
    """How many predictions are the same, what McNemar's test says of the others, and in which classes they are."""
    _log.info(
        "Agreement with %s: %.2f %%, 95 %% interval %.2f to %.2f; right only there %d, only here %d, McNemar p = %.3g",
        *(other, comparison.agreement, *comparison.agreement_interval),
        *(comparison.lost, comparison.won, comparison.p_value),
    )
    ranked = sorted(enumerate(comparison.flips), key=lambda each: -each[1])
    changed = [f"{classes[index]} ({count})" for index, count in ranked[:_MOST_CHANGED] if count]
    if changed:
        _log.info("Predictions changed most in images of: %s", ", ".join(changed))


def comparison_row(comparison: Comparison) -> dict[str, float | str]:
    """The columns of a comparison in `metrics.csv`; `flips` has ``class:count`` of each class that changed."""
    low, high = comparison.agreement_interval
    flips = " ".join(f"{index}:{count}" for index, count in enumerate(comparison.flips) if count)
    return {
        "agreement": comparison.agreement,
        "agreement_low": low,
        "agreement_high": high,
        "lost": comparison.lost,
        "won": comparison.won,
        "mcnemar_p": comparison.p_value,
        "flips": flips,
    }
