"""Calibration: activation statistics in one pass, which goes on where an interrupted one stopped."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlib.app.images import loader_of, open_split, report_skipped
from qlib.app.job import Job
from qlib.app.report import record
from qlib.checkpoint.fingerprint import weights_hash
from qlib.data.datasets import ImageDataset
from qlib.data.loader import Loader
from qlib.data.subset import choose_subset
from qlib.files import STATS
from qlib.graph import LAYOUT, Graph
from qlib.progress import track
from qlib.report.record import Calibration
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.histogram_file import histogram_path
from qlib.stats.stats_file import write_stats
from qlib.stats.tensor_stats import ModelStats

__all__ = ["calibrate"]

_log = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 5.0


def calibrate(job: Job, graph: Graph, fraction: float, *, histograms: bool = False) -> ModelStats:
    """Collects statistics on a fixed `fraction` of the calibration split and writes them to `stats/` and the run.

    Histograms are collected where `histograms` or `--qe-histograms` asks for them.

    The state is kept in `stats/*.partial.safetensors` from the first images on; the same command takes it up again, and
    the result has the same bytes as without the interruption, whatever the batch size.

    Raises:
        DataError: images are missing or damaged.
        StatsError: an activation is NaN or infinite.
        OutputError: the statistics cannot be written.
        KeyboardInterrupt: with a sentence for the user.
    """
    config = job.config
    split = config.qe.calibration_split
    dataset = open_split(job, split)
    # In random order: images sorted by class would let the running means, from which b is taken, wander.
    indices = choose_subset(len(dataset), fraction, job.calibration_seed, shuffled=True)
    fingerprint, stem = _fingerprint(job, len(indices)), _stem(job)
    histograms = histograms or config.qe.histograms
    key = {**fingerprint, "seed": job.calibration_seed, "data": str(config.data), "histograms": histograms}
    unfinished = _Unfinished(STATS / f"{stem}.partial.safetensors", key)
    _log.info("Collecting quantization calibration stats based on %.1f%% of %s dataset", 100 * fraction, split)
    collector = Collector(graph, histograms=histograms)
    began = time.monotonic()
    _collect(job, collector, dataset, indices, unfinished)
    record(job, calibration=Calibration(collector.samples, split, round(time.monotonic() - began, 3)))
    stats = ModelStats(collector.result(), {**fingerprint, "samples": collector.samples})
    path = STATS / f"{stem}.yaml"
    write_stats(path, stats)
    write_stats(job.file("acts_quantization_stats.yaml"), stats)
    unfinished.path.unlink(missing_ok=True)
    _log.info("Stats collection complete")
    _log.info("Stats saved to %s", path)
    if histograms:
        _log.info("Histograms saved to %s", histogram_path(path))
    return stats


def _fingerprint(job: Job, samples: int) -> dict[str, str | int]:
    """What the statistics are of."""
    corrections = job.config.ptq.of_float
    return {
        "arch": job.spec.arch,
        "weights": weights_hash(job.model.state_dict()),
        "dataset": job.dataset_name,
        "split": job.config.qe.calibration_split,
        "samples": samples,
        **({"corrections": corrections} if corrections else {}),
    }


def _stem(job: Job) -> str:
    """The name of the statistics' file, without its ending."""
    draw = f"seed{job.calibration_seed}" if job.draw else ""
    words = (Path(job.spec.arch).name, job.dataset_name, job.config.ptq.of_float, draw)
    return re.sub(r"[^\w.-]+", "_", "_".join(filter(None, words)))


@dataclass(frozen=True)
class _Unfinished:
    """Where the state of an interrupted collection is kept; its `key` tells one collection from another."""

    path: Path
    key: Mapping[str, Any]

    def load(self, collector: Collector, total: int) -> int:
        """Takes up what was kept; returns how many images are done."""
        done = collector.load(self.path, self.key, total)
        if self.path.exists() and not done:
            _log.info("The unfinished collection in %s is of other settings, or damaged, and is replaced", self.path)
        if done:
            _log.info("Going on from a broken collection: %d of %d images are done", done, total)
        return done

    def save(self, collector: Collector) -> None:
        """Keeps the state. Raises OutputError where it cannot be written."""
        collector.save(self.path, self.key)


def _collect(
    job: Job, collector: Collector, dataset: ImageDataset, indices: list[int], unfinished: _Unfinished
) -> None:
    """Feeds the images that are not done yet to the collector, and saves its state now and then."""
    start = unfinished.load(collector, len(indices))
    if start >= len(indices):
        return
    # Batches of what the collector measures at once: its sums then depend neither on -b, nor on where an interrupted
    # collection stopped, nor on how many corrupt images are left out.
    loader = loader_of(job, dataset, indices[start:], MICRO_BATCH)
    batches = track(
        loader,
        total_images=len(indices),
        batch_size=MICRO_BATCH,
        description="Calibration",
        print_freq=job.config.print_freq,
        images_done=start,
    )
    try:
        _feed(job, collector, batches, loader, unfinished)
    except KeyboardInterrupt:
        if collector.samples:
            unfinished.save(collector)
        raise KeyboardInterrupt(
            f"calibration stopped after {collector.samples} of {len(indices)} images;"
            " run the same command again to go on"
        ) from None
    report_skipped(loader)


def _feed(
    job: Job, collector: Collector, batches: Iterable[tuple[Tensor, Tensor]], loader: Loader, unfinished: _Unfinished
) -> None:
    next_save = time.monotonic()  # the first state at once: a folder that cannot be written shows now, not at the end
    skipped = 0
    for images, _ in batches:
        images = images.to(job.device, memory_format=LAYOUT)
        collector.update(images, consumed=len(images) + len(loader.skipped) - skipped)
        skipped = len(loader.skipped)
        if time.monotonic() >= next_save:
            unfinished.save(collector)
            next_save = time.monotonic() + _SAVE_EVERY_SECONDS
