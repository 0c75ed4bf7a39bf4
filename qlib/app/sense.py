"""``--sense element``, ``filter`` or ``channel``: what magnitude pruning of each weight alone does, on test images."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from qlib.app.capture import capture_model
from qlib.app.images import SEARCH_BATCH, loader_of, report_skipped, test_loader
from qlib.app.job import Job
from qlib.app.report import record
from qlib.checkpoint.fingerprint import weights_hash
from qlib.data.loader import Loader
from qlib.errors import ModelError, UsageError
from qlib.files import STATS, write_csv
from qlib.graph import LAYOUT
from qlib.lower import exact_arithmetic
from qlib.progress import track
from qlib.prune.removal import REMOVALS
from qlib.prune.sensitivity import PruningSensitivity, PruningStudy, sparsity_levels
from qlib.report.plots import NO_MATPLOTLIB, plot_pruning

__all__ = ["analyse_pruning", "removal_table"]

_log = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 5.0
_MOST_COLUMNS = 6
_POINTS = 1.0  #: of Top1, that the last column of the table allows to lose


def analyse_pruning(job: Job) -> None:
    """Measures each weight at all levels of `--sense-range`; logs a table, writes ``sensitivity.csv`` and a plot.

    An interrupted run is taken up by the same command. Raises ModelError where the model gives NaN.
    """
    study, began = _study(job), time.monotonic()
    _log.info("--- sensitivity (%s) ---------------------", job.config.sense)
    partial = _measure(job, study)
    _log.info("Sensitivity took %.1f s", time.monotonic() - began)
    reference, rows = study.reference(), study.results()
    if not math.isfinite(reference.loss):
        raise ModelError(f"{job.spec.arch} gives NaN or infinity for some of these images, so it has no loss")
    _log.info("%s", _result_table(rows, reference))
    _log.info("As it is: Top1 %.3f    Top5 %.3f    Loss %.5f", reference.top1, reference.top5, reference.loss)
    path = job.file("sensitivity.csv")
    write_csv(path, [each.name for each in fields(PruningSensitivity)], map(astuple, rows))
    record(job, pruning_sensitivity=tuple(rows))
    partial.unlink(missing_ok=True)
    _log.info("Sensitivity of each weight saved to %s", path)
    plot = job.file("sensitivity.png")
    if plot_pruning(plot, rows, reference):
        _log.info("Plot saved to %s", plot)
    else:
        _log.info(NO_MATPLOTLIB)


def _study(job: Job) -> PruningStudy:
    """What is to be measured. Raises UsageError where there is nothing."""
    what, levels = job.config.sense, sparsity_levels(*job.config.sense_range)
    assert what is not None
    study = PruningStudy(job.model, capture_model(job), REMOVALS[what], levels)
    if study.left_out:
        _log.warning(
            "Warning: %d weights are left out: the graph that is run holds what follows from them as constants (%s%s)",
            len(study.left_out),
            ", ".join(study.left_out[:3]),
            ", ..." * (len(study.left_out) > 3),
        )
    if not study.weights:
        raise UsageError(
            f"--sense {what} finds nothing to measure: {job.spec.arch} has no weights of convolutions; give --sense"
            " element, which looks at linear layers too"
        )
    return study


def removal_table(job: Job) -> str:
    """What `--sense` would remove of each weight, without looking at an image."""
    study, removal = _study(job), REMOVALS[str(job.config.sense)]
    levels = _shown(sparsity_levels(*job.config.sense_range))
    lines = [
        [
            each.name,
            "x".join(map(str, each.parameter.shape)),
            f"{each.count(removal):,}",
            *(f"{each.count(removal, level):,}" for level in levels),
        ]
        for each in study.weights
    ]
    headers = [
        "Parameter",
        "Shape",
        f"{str(job.config.sense).capitalize()}s",
        *(f"at {_level(each)}" for each in levels),
    ]
    table = tabulate(lines, headers, tablefmt="psql", disable_numparse=True)
    return f"{table}\nSensitivity: {len(study.weights)} weights, {len(study) - 1} variants"


def _measure(job: Job, study: PruningStudy) -> Path:
    """Runs the study over the test images, or what is left of them; the file in which it is kept until it is done."""
    whole, what = test_loader(job), str(job.config.sense)
    total = whole.total_images
    path, key = STATS / f"{_stem(job)}_sense_{what}.partial.safetensors", _key(job, total)
    if study.load(path, key, total):
        _log.info("Going on from a broken analysis: %d of %d images are done", study.images_done, total)
    _log.info("Sensitivity: %d weights, %d variants, each on %d test images", len(study.weights), len(study) - 1, total)
    left = list(whole.indices[study.images_done :])
    if left:
        loader = loader_of(job, whole.dataset, left, SEARCH_BATCH)
        try:
            _run(job, study, loader, path, key, total)
        except KeyboardInterrupt:
            if study.images_done or study.steps_done:
                study.save(path, key)
            raise KeyboardInterrupt(
                f"sensitivity stopped after {study.images_done} of {total} images; run the same command again to go on"
            ) from None
        report_skipped(loader)
    return path


def _run(job: Job, study: PruningStudy, loader: Loader, path: Path, key: dict[str, Any], total: int) -> None:
    steps = track(
        study.steps(_batches(job, loader)),
        total_images=len(study) * total,
        batch_size=SEARCH_BATCH,
        description="Sensitivity",
        print_freq=10 * job.config.print_freq,
        count=lambda done: done,
        images_done=len(study) * study.images_done + study.steps_done * SEARCH_BATCH,
    )
    next_save = time.monotonic()  # the first state at once: a folder that cannot be written shows now, not at the end
    with exact_arithmetic():
        for _ in steps:
            if time.monotonic() >= next_save:
                study.save(path, key)
                next_save = time.monotonic() + _SAVE_EVERY_SECONDS


def _batches(job: Job, loader: Loader) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Images, labels, and how many images the data set was asked for: corrupt ones may be left out."""
    skipped = 0
    for images, labels in loader:
        yield images.to(job.device, memory_format=LAYOUT), labels, len(images) + len(loader.skipped) - skipped
        skipped = len(loader.skipped)


def _key(job: Job, total: int) -> dict[str, Any]:
    """What tells one analysis from another."""
    config = job.config
    return {
        "arch": job.spec.arch,
        "weights": weights_hash(job.model.state_dict()),
        "data": [job.dataset_name, str(config.data), total, config.seed, config.skip_corrupt],
        "sense": [config.sense, *config.sense_range],
    }


def _stem(job: Job) -> str:
    return re.sub(r"[^\w.-]+", "_", f"{Path(job.spec.arch).name}_{job.dataset_name}")


def _shown(levels: Sequence[float]) -> list[float]:
    """At most `_MOST_COLUMNS` of the levels above 0, evenly spread, the last one among them.

    >>> _shown((0.0, 0.25, 0.5)), len(_shown(range(100)))
    ([0.25, 0.5], 6)
    """
    above = [level for level in levels if level > 0]
    step = -(-len(above) // _MOST_COLUMNS) or 1
    return above[::-step][::-1]


def _level(level: float) -> str:
    return f"{100 * level:.4g} %"


def _result_table(rows: Sequence[PruningSensitivity], reference: PruningSensitivity) -> str:
    """Top1 of each weight at some levels, the most sensitive first, and the level up to which little is lost."""
    found: dict[str, list[PruningSensitivity]] = {}
    for row in rows:
        found.setdefault(row.parameter, []).append(row)
    shown = _shown([row.sparsity for row in next(iter(found.values()))])
    ordered = sorted(found.items(), key=lambda item: (sum(row.top1 for row in item[1]), item[0]))
    lines = [
        [name, *(f"{row.top1:.3f}" for row in own if row.sparsity in shown), _tolerated(own, reference.top1 - _POINTS)]
        for name, own in ordered
    ]
    headers = ["Parameter", *(f"Top1 at {_level(each)}" for each in shown), f"Loses {_POINTS:g} point at"]
    return tabulate(lines, headers, tablefmt="psql", disable_numparse=True)


def _tolerated(rows: Sequence[PruningSensitivity], least: float) -> str:
    """The first level at which Top1 is below the least."""
    return next((_level(row.sparsity) for row in rows if row.top1 < least), "-")
