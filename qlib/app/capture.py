"""The captured and folded model of a run, held against the model itself."""

from __future__ import annotations

import logging

import torch

from qlib.app.job import Job
from qlib.graph import FoldedGraph, Graph, capture, fold, lay_out

__all__ = ["capture_model", "fold_model"]

_log = logging.getLogger(__name__)

_MOST = 1e-2
"""Difference of the logits, relative to the largest, that rounding in float32 explains: it is 9e-4 in the worst of
torchvision's models with random weights."""


def fold_model(job: Job) -> FoldedGraph:
    """Captures and folds the model, and warns where that does not compute what the model does."""
    folded = fold(job.model, job.example)
    _compare(job, folded.graph)
    return folded


def capture_model(job: Job) -> Graph:
    """The same with its batch-norms; it computes with the model's own weights, so that a change of these shows."""
    graph = lay_out(capture(job.model, job.example, share=True)).eval()
    _compare(job, graph)
    return graph


def _compare(job: Job, graph: Graph) -> None:
    """Warns where a graph does not compute what the model does."""
    difference = _difference(job, graph)
    if difference > _MOST:
        _log.warning(
            "Warning: the captured graph of %s gives other logits than the model, by %.2g of the largest on random"
            " images; what follows is of the graph: please report the model",
            job.spec.arch,
            difference,
        )


@torch.inference_mode()
def _difference(job: Job, graph: Graph) -> float:
    """The largest difference of the logits of two random images, relative to the largest logit; 0 if none is finite."""
    images = torch.randn(job.example.shape, generator=torch.Generator().manual_seed(0)).to(job.device)
    expected, found = job.model(images), graph(images)
    largest = expected.abs().max()
    return float(((found - expected).abs().max() / largest).nan_to_num(0.0)) if largest > 0 else 0.0
