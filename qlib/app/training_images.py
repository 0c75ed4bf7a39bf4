"""The images of a run of training."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qlib.app.job import Job, loader_of, open_split
from qlib.data import ImageDataset, Loader, augmented, choose_subset, epoch_order, split_train
from qlib.graph import LAYOUT, Graph
from qlib.models.transforms import training_transform
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.tensor_stats import ModelStats

__all__ = ["TrainingImages"]

_log = logging.getLogger(__name__)


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

    def statistics(self, graph: Graph, count: int) -> ModelStats:
        """Statistics, with histograms, of training images as evaluation sees them."""
        collector = Collector(graph, histograms=True)
        order = epoch_order(self.training, 1.0, self.job.config.seed, epoch=0)[:count]
        for images, _ in loader_of(self.job, self.dataset, order, MICRO_BATCH):
            collector.update(images.to(self.job.device, memory_format=LAYOUT), consumed=len(images))
        return ModelStats(collector.result(), {"samples": collector.samples})
