"""The model of a run without channels: the zero ones of `--thinnify`, or those that pruning chose."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from qlib.app.job import Job
from qlib.app.report import record_file
from qlib.checkpoint.masks import saved_masks
from qlib.checkpoint.write import write_checkpoint
from qlib.graph import Graph
from qlib.graph.capture import capture
from qlib.graph.cost import layer_macs
from qlib.prune.masks import apply_masks
from qlib.surgery.dead import DeadClasses, thin_dead
from qlib.surgery.recipe_file import saved_recipe, trainable_graph
from qlib.surgery.thin import recipe_of

__all__ = ["THINNED", "dead_lines", "hand_over_thinned", "log_sizes", "thinnify"]

_log = logging.getLogger(__name__)

THINNED = "thinned_checkpoint.pth.tar"


def thinnify(job: Job) -> Job:
    """The run with a model without the channels that do nothing, which is saved in the run's folder."""
    apply_masks(job.model, job.masks)
    small, dead = thin_dead(trainable_graph(job.model, job.example))
    for line in dead_lines(dead, "--thinnify"):
        _log.info("%s", line)
    return hand_over_thinned(job, small) if dead.all else job


def dead_lines(dead: DeadClasses, what: str) -> list[str]:
    """What goes, and why that changes nothing, or where it does."""
    if not dead.all:
        return [f"{what}: no channel is zero where it is made, or where it is read; the model stays as it is"]
    unread, constant = len(dead.unread), len(dead.constant)
    found = [f"{what}: {unread} channels are read by no weight, and {constant} are the same number for all images"]
    if constant:
        found.append("What a constant channel adds to the next layer is in that layer's bias or batch-norm now")
    if dead.at_borders:
        found.append(
            f"Of the constant ones {len(dead.at_borders)} are not 0 and are read by convolutions that pad with zeros:"
            " at the borders of images, and nowhere else, the thinned model computes something else"
        )
    return found


def hand_over_thinned(job: Job, small: Graph) -> Job:
    """The run with a thinned model, and with what is left of its masks; it is saved, and its size is told."""
    dense, recipe = job.model, recipe_of(small)
    assert recipe is not None
    thin = replace(job, model=small, masks=recipe.since(recipe_of(dense)).of_tensors(job.masks))
    log_sizes(job, dense, small)
    path = job.file(THINNED)
    write_checkpoint(
        path,
        {
            "arch": job.spec.arch,
            "dataset": job.dataset_name,
            "num_classes": job.num_classes,
            "state_dict": {name: value.cpu() for name, value in small.state_dict().items()},
            **saved_recipe(small),
            **saved_masks(thin.masks),
        },
    )
    _log.info("Thinned checkpoint saved to %s; give it with --resume-from, wherever a checkpoint goes", path)
    record_file(job, "thinned checkpoint", path)
    return thin


def log_sizes(job: Job, dense: nn.Module, small: nn.Module) -> None:
    """Tells how large a model was and is."""
    for what, before, after in _sizes(job, dense, small):
        _log.info("%-10s %13s -> %13s (%.1f %%)", what, f"{before:,}", f"{after:,}", 100 * after / max(before, 1))


def _sizes(job: Job, dense: nn.Module, small: nn.Module) -> list[tuple[str, int, int]]:
    """Parameters, weights of two axes or more, multiply-accumulates for an image, and bytes: before and after."""
    models = (dense, small)
    parameters = [sum(each.numel() for each in model.parameters()) for model in models]
    weights = [sum(each.numel() for each in model.parameters() if each.ndim > 1) for model in models]
    macs = [sum(filter(None, layer_macs(capture(model, job.example)).values())) for model in models]
    size = [sum(each.numel() * each.element_size() for each in model.state_dict().values()) for model in models]
    rows = {"Parameters": parameters, "Weights": weights, "MACs": macs, "Bytes": size}
    return [(what, before, after) for what, (before, after) in rows.items()]
