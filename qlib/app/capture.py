"""The captured and folded model of a run, held against the model itself."""

from __future__ import annotations

import logging

import torch

from qlib.app.job import Job
from qlib.graph import FoldedGraph, fold

__all__ = ["fold_model"]

_log = logging.getLogger(__name__)

_MOST = 1e-2
"""Difference of the logits, relative to the largest, that rounding in float32 explains: it is 9e-4 in the worst of
torchvision's models with random weights."""


def fold_model(job: Job) -> FoldedGraph:
    """Captures and folds the model, and warns where that does not compute what the model does."""
    folded = fold(job.model, job.example)
    difference = _difference(job, folded)
    if difference > _MOST:
        _log.warning(
            "Warning: the captured graph of %s gives other logits than the model, by %.2g of the largest on random"
            " images; what follows is of the graph: please report the model",
            job.spec.arch,
            difference,
        )
    return folded


@torch.inference_mode()
def _difference(job: Job, folded: FoldedGraph) -> float:
    """The largest difference of the logits of two random images, relative to the largest logit; 0 if none is finite."""
    images = torch.randn(job.example.shape, generator=torch.Generator().manual_seed(0)).to(job.device)
    expected, found = job.model(images), folded.graph(images)
    largest = expected.abs().max()
    return float(((found - expected).abs().max() / largest).nan_to_num(0.0)) if largest > 0 else 0.0
