"""The images of a run: those of each split, of calibration, of searches, of training and of the test."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from PIL import Image
from torch import Tensor

from qlib.app.job import Job
from qlib.data.augmented import augmented
from qlib.data.datasets import ImageDataset, Split, open_dataset
from qlib.data.loader import Loader, make_loader
from qlib.data.subset import choose_subset, epoch_order, split_train
from qlib.graph import LAYOUT, Graph
from qlib.models.transforms import training_transform
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.data_free import image_range_of
from qlib.stats.tensor_stats import ModelStats

__all__ = [
    "SEARCH_BATCH",
    "TrainingImages",
    "calibration_batches",
    "image_range",
    "images_in_memory",
    "loader_of",
    "open_split",
    "report_skipped",
    "split_size",
    "test_loader",
    "training_batches",
]

_log = logging.getLogger(__name__)

SEARCH_BATCH = 32
"""Images that a search runs at once: activations of more would leave the cache."""


def open_split(job: Job, split: str) -> ImageDataset:
    """The `train`, `val` or `test` images. Raises DataError where they are missing or of other classes."""
    return open_dataset(
        job.dataset_name, job.config.data, cast(Split, split), job.spec.transform, num_classes=job.num_classes
    )


def loader_of(job: Job, dataset: ImageDataset, indices: list[int], batch_size: int) -> Loader:
    """The images at `indices`, in that order, read as the flags say."""
    config = job.config
    return make_loader(
        dataset,
        batch_size=batch_size,
        workers=config.workers,
        indices=indices,
        skip_corrupt=config.skip_corrupt,
    )


def test_loader(job: Job) -> Loader:
    """The test images; the sizes of all parts of the dataset are logged."""
    config, dataset = job.config, open_split(job, "test")
    indices = choose_subset(len(dataset), config.effective_test_size, config.seed)
    train, validation = split_train(_train_images(job), config.validation_split, config.seed)
    _log.info(
        "Dataset sizes:\n\ttraining=%d\n\tvalidation=%d\n\ttest=%d",
        round(len(train) * config.effective_train_size),
        round(len(validation) * config.effective_valid_size),
        len(indices),
    )
    return loader_of(job, dataset, indices, config.batch_size)


def _train_images(job: Job) -> int:
    """How many training images there are; a folder with val/ alone is enough to evaluate."""
    root = job.config.data
    if root is not None and (root / "val").is_dir() and not (root / "train").is_dir():
        return 0
    return len(open_split(job, "train"))


def split_size(job: Job, split: str) -> int:
    """How many images a split has."""
    return len(open_split(job, split))


def calibration_batches(
    job: Job, count: int, batch_size: int, fraction: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, on the job's device, and labels of the calibration split in its fixed random order.

    They are a `fraction` of the split, but `count` at most.
    """
    dataset = open_split(job, job.config.qe.calibration_split)
    indices = choose_subset(len(dataset), fraction, job.calibration_seed, shuffled=True)[:count]
    loader = loader_of(job, dataset, indices, batch_size)
    for images, labels in loader:
        yield images.to(job.device, memory_format=LAYOUT), labels.to(job.device)
    report_skipped(loader)


def training_batches(job: Job, batch_size: int) -> Iterator[Tensor]:
    """Training images without end, changed at random as training changes them, in whole batches where there are such.

    None of them is a validation image.
    """
    dataset = open_split(job, "train")
    training, _ = split_train(len(dataset), job.config.validation_split, job.config.seed)
    transform = training_transform(job.spec, job.dataset_name)
    for epoch in itertools.count():
        order = epoch_order(training, 1.0, job.config.seed, epoch)
        whole = max(batch_size, len(order) - len(order) % batch_size)
        loader = loader_of(job, augmented(dataset, transform, job.config.seed, epoch), order[:whole], batch_size)
        yield from (images.to(job.device, memory_format=LAYOUT) for images, _ in loader)


def report_skipped(loader: Loader) -> None:
    """Warns of the images that the last pass left out."""
    if loader.skipped:
        count, first = len(loader.skipped), loader.skipped[0]
        _log.warning("Warning: %d corrupt images were left out, the first is %s", count, first)


def images_in_memory(job: Job, count: int, fraction: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels: a `fraction` of the calibration split, but `count` at most."""
    return list(calibration_batches(job, count, SEARCH_BATCH, fraction))


def image_range(job: Job) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each color ``[colors]`` that the model can see, by its transform."""
    _, height, width = job.spec.input_shape
    black, white = (job.spec.transform(Image.new("RGB", (width, height), color)) for color in ("black", "white"))
    return image_range_of(black, white)


@dataclass(frozen=True)
class TrainingImages:
    """What epochs train on, and what validation and the test look at.

    Laws: `training` and the validation images do not overlap, unless the test images are validated on; the images of an
    epoch and their order follow from seed and epoch.
    """

    job: Job
    dataset: ImageDataset
    training: list[int]
    validation: Loader
    test: Loader

    @classmethod
    def of(cls, job: Job) -> TrainingImages:
        config = job.config
        dataset, test = open_split(job, "train"), open_split(job, "test")
        training, held_out = split_train(len(dataset), config.validation_split, config.seed)
        test_indices = choose_subset(len(test), config.effective_test_size, config.seed)
        source, pool = (dataset, held_out) if held_out else (test, list(range(len(test))))
        chosen = choose_subset(len(pool), config.effective_valid_size, config.seed)
        count = max(1, round(len(training) * config.effective_train_size))
        _log.info("Dataset sizes:\n\ttraining=%d\n\tvalidation=%d\n\ttest=%d", count, len(chosen), len(test_indices))
        return cls(
            job,
            dataset,
            training,
            loader_of(job, source, [pool[index] for index in chosen], config.batch_size),
            loader_of(job, test, test_indices, config.batch_size),
        )

    def epoch(self, epoch: int) -> Loader:
        """The training images in the order of an epoch, changed at random."""
        config = self.job.config
        order = epoch_order(self.training, config.effective_train_size, config.seed, epoch)
        transform = training_transform(self.job.spec, self.job.dataset_name)
        changed = augmented(self.dataset, transform, config.seed, epoch)
        return loader_of(self.job, changed, order, config.batch_size)

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return -(-len(self.epoch(0).indices) // self.job.config.batch_size)

    def sample(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Batches of `count` training images as evaluation sees them, always the same ones."""
        order = epoch_order(self.training, 1.0, self.job.config.seed, epoch=0)[:count]
        for images, _ in loader_of(self.job, self.dataset, order, batch_size):
            yield images.to(self.job.device, memory_format=LAYOUT)

    def statistics(self, graph: Graph, count: int) -> ModelStats:
        """Statistics, with histograms, of training images as evaluation sees them."""
        collector = Collector(graph, histograms=True)
        for images in self.sample(count, MICRO_BATCH):
            collector.update(images, consumed=len(images))
        return ModelStats(collector.result(), {"samples": collector.samples})
