"""What a run looks at beside its scores: activity of activation functions, histograms, sparsity of masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qlib.app.capture import capture_model
from qlib.app.images import SEARCH_BATCH, loader_of, open_split, report_skipped, test_loader
from qlib.app.job import Job
from qlib.data.loader import Loader
from qlib.data.subset import choose_subset, split_train
from qlib.errors import UsageError
from qlib.files import write_csv
from qlib.graph import LAYOUT
from qlib.progress import track
from qlib.report.observed import activity_table, masks_table, parameter_histograms
from qlib.stats.activity import ActivityCollector
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.stats_file import write_stats
from qlib.stats.tensor_stats import ModelStats

__all__ = ["collect_histograms", "log_masks", "observe"]

_log = logging.getLogger(__name__)


def observe(job: Job) -> None:
    """Writes what `--activation-stats` and `--param-hist` ask for, of the float model as the run leaves it."""
    for phase in dict.fromkeys(job.config.activation_stats):
        _measure_activity(job, phase)
    if job.config.param_hist:
        path = job.file("parameter_histograms.csv")
        write_csv(path, ("parameter", "low", "high", "count"), parameter_histograms(job.model))
        _log.info("Histograms of parameters saved to %s", path)


def log_masks(job: Job) -> None:
    """Logs the table that `--masks-sparsity` asks for."""
    if job.config.masks_sparsity:
        _log.info("%s", masks_table(job.masks))


def _measure_activity(job: Job, phase: str) -> None:
    """Runs the model over the images of a phase, and writes two tables: by layers, and by channels."""
    collector = ActivityCollector(capture_model(job))
    if not len(collector):
        _log.warning("Warning: %s has no activation functions to measure", job.spec.arch)
        return
    _run(job, _phase_loader(job, phase), f"Activations ({phase})", collector.run)
    found = collector.result()
    by_layer, by_channel = job.file(f"activation_stats_{phase}.csv"), job.file(f"activation_channels_{phase}.csv")
    rows = [(name, 100 * each.sparsity, float(each.l1.mean()), float(each.mean.mean())) for name, each in found.items()]
    write_csv(by_layer, ("layer", "sparsity_ofm", "l1", "mean"), rows)
    write_csv(
        by_channel,
        ("layer", "channel", "apoz_channels", "l1_channels", "mean_channels"),
        (
            (name, channel, *numbers)
            for name, each in found.items()
            for channel, numbers in enumerate(torch.stack([100 * each.zeros, each.l1, each.mean], 1).tolist())
        ),
    )
    _log.info("%s", activity_table(found))
    _log.info("Activations of the %s images saved to %s and %s", phase, by_layer, by_channel.name)


def _phase_loader(job: Job, phase: str) -> Loader:
    """The images of a phase, as evaluation sees them."""
    if phase == "test":
        whole = test_loader(job)
        return loader_of(job, whole.dataset, list(whole.indices), SEARCH_BATCH)
    config, dataset = job.config, open_split(job, "train")
    training, held_out = split_train(len(dataset), config.validation_split, config.seed)
    indices, share = training, config.effective_train_size
    if phase == "valid":
        indices, share = held_out, config.effective_valid_size
        if not held_out:
            raise UsageError(
                "--activation-stats valid finds no images with --validation-split 0; give test, or a share"
            )
    chosen = choose_subset(len(indices), share, config.seed)
    return loader_of(job, dataset, [indices[each] for each in chosen], SEARCH_BATCH)


def collect_histograms(job: Job) -> None:
    """Collects histograms of all activations on the fraction of the test images that `--activation-histograms` says."""
    fraction = job.config.activation_histograms
    assert fraction is not None
    dataset = open_split(job, "test")
    loader = loader_of(job, dataset, choose_subset(len(dataset), fraction, job.config.seed), MICRO_BATCH)
    collector = Collector(capture_model(job), histograms=True)
    _run(job, loader, "Histograms", collector.update)
    stats = ModelStats(collector.result(), {"arch": job.spec.arch, "split": "test", "samples": collector.samples})
    path, table = job.file("acts_histograms.yaml"), job.file("acts_histograms.csv")
    write_stats(path, stats)
    write_csv(table, ("layer", "low", "high", "count"), _bins(stats))
    _log.info("Histograms of activations saved to %s and %s", path, table.name)


def _bins(stats: ModelStats) -> Iterator[tuple[str, float, float, int]]:
    """The bins of each layer's output that hold anything; zeros that an activation function made have their own."""
    for name, layer in stats.layers.items():
        found = layer.output.histogram
        if found is None:
            continue
        if found.zeros:
            yield name, 0.0, 0.0, found.zeros
        for index, count in enumerate(found.counts):
            if count:
                yield name, found.low + index * found.width, found.low + (index + 1) * found.width, count


def _run(job: Job, loader: Loader, description: str, add: Callable[[Tensor], object]) -> None:
    for images, _ in track(
        loader,
        total_images=loader.total_images,
        batch_size=loader.batch_size,
        description=description,
        print_freq=10 * job.config.print_freq,
    ):
        add(images.to(job.device, memory_format=LAYOUT))
    report_skipped(loader)
