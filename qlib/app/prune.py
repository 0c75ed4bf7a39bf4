"""Pruning without training: choose, remove, repair, tell what is left, and write it."""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qlib.app.images import training_batches
from qlib.app.job import Job
from qlib.app.prune_channels import prune_channels
from qlib.app.prune_images import BATCH, IMPORTANCE, pruning_images
from qlib.app.report import record
from qlib.checkpoint.masks import saved_masks
from qlib.checkpoint.write import write_checkpoint
from qlib.config.flags.pruning import CHANNEL_PRUNERS, REPAIRS
from qlib.config.flags.pruning import PRUNERS as FACTS
from qlib.errors import UsageError
from qlib.files import STATS
from qlib.graph import Graph, capture
from qlib.prune.choose import Pattern, choose_masks, choose_pattern
from qlib.prune.importance import output_importance
from qlib.prune.layers import PrunedLayer, chosen_layers, prunable_layers
from qlib.prune.logits import match_logits
from qlib.prune.masks import Masks, apply_masks, joined
from qlib.prune.methods._base import PRUNERS, Score, Seen
from qlib.prune.refit import Repair, refit, survey
from qlib.report.pruning import pruned_weights, pruning_table

__all__ = ["prune", "report_size", "save_pruned"]

_log = logging.getLogger(__name__)


_SPEED = (
    "Zeros among the weights, of N:M too, make the compressed file smaller, not the model faster: ONNX Runtime, the"
    " convolutions of OpenVINO and torch multiply by them like by others; fewer channels or fewer bits are faster"
)


def prune(job: Job) -> Job:
    """The job with its model pruned and repaired.

    Raises UsageError where names match nothing, where no layer has the pattern's shape, or where a layer would be left
    without weights.
    """
    args = job.config.prune
    if args.method in CHANNEL_PRUNERS:
        return prune_channels(job)
    model = copy.deepcopy(job.model)
    graph = capture(model, job.example, share=True).eval()
    layers = chosen_layers(prunable_layers(graph, model), args.layers, "--prune-layers")
    layers = layers if args.pattern is None else _fitting(layers, Pattern.of(args.pattern))
    masks = joined(job.masks, _choose(job, graph, layers))
    _refuse_empty(masks)
    apply_masks(model, masks)
    errors = _repair(job, model, graph, layers, masks)
    kept = pruned_weights(masks, errors)
    record(job, pruned=kept)
    _log.info("%s", pruning_table(kept))
    return replace(job, model=model, masks=masks)


def _fitting(layers: Sequence[PrunedLayer], pattern: Pattern) -> list[PrunedLayer]:
    """Those whose input channels come in whole groups. Raises UsageError where there are none."""
    fit = [each for each in layers if each.inputs[0] % pattern.m == 0]
    if not fit:
        raise UsageError(
            f"--prune-pattern {pattern} needs a layer whose input channels are a multiple of {pattern.m}, and none of"
            f" the {len(layers)} chosen is; choose other layers, or give --prune-level"
        )
    for each in layers:
        if each not in fit:
            count = each.inputs[0]
            _log.info("%s stays dense: its %d input channels are no multiple of %d", each.parameter, count, pattern.m)
    return fit


def _choose(job: Job, graph: Graph, layers: Sequence[PrunedLayer]) -> Masks:
    """The masks of the method that was asked for."""
    args = job.config.prune
    assert args.method is not None
    facts, pattern = FACTS[args.method], None if args.pattern is None else Pattern.of(args.pattern)
    scores = dict(_scores(job, graph, layers, PRUNERS[args.method], pattern, images=facts.images))
    if pattern is not None:
        chosen = {each.parameter: choose_pattern(scores[each.parameter], _group(each, pattern), pattern)
                  for each in layers}  # fmt: skip
    else:
        assert args.level is not None
        chosen = choose_masks(scores, args.level, args.scope or facts.scope)
    return {each.parameter: each.as_weight(chosen[each.parameter]) for each in layers}


def _scores(
    job: Job, graph: Graph, layers: Sequence[PrunedLayer], score: Score, pattern: Pattern | None, *, images: bool
) -> Iterator[tuple[str, Tensor]]:
    """Parameter -> the score of each weight ``[out, in]``."""
    importance = output_importance(graph, layers, pruning_images(job, IMPORTANCE), job.config.seed) if images else {}
    seen = survey(graph, layers, pruning_images(job), STATS) if images else ((each, None) for each in layers)
    for layer, moments in seen:
        rows = layer.rows
        group, most = (None, 0) if pattern is None else (_group(layer, pattern), pattern.m - pattern.n)
        unit = torch.eye(rows.shape[2], dtype=torch.float64).expand(len(rows), -1, -1)
        outputs = importance.get(layer.node.name, torch.ones(rows.shape[:2].numel())).view(rows.shape[:2])
        found = [
            score(part, Seen(own, weight, group, most))
            for part, own, weight in zip(rows, unit if moments is None else moments, outputs, strict=True)
        ]
        yield layer.parameter, torch.cat(found)


def _group(layer: PrunedLayer, pattern: Pattern) -> Tensor:
    return pattern.groups(*layer.inputs)


def _refuse_empty(masks: Masks) -> None:
    """Raises UsageError where nothing of a layer is left."""
    empty = [name for name, mask in masks.items() if not bool(mask.any())]
    if empty:
        raise UsageError(
            f"nothing would be left of {empty[0]!r}; lower --prune-level, leave it out with --prune-layers, or give"
            " --prune-scope layer"
        )


def _repair(job: Job, model: nn.Module, graph: Graph, layers: Sequence[PrunedLayer], masks: Masks) -> dict[str, float]:
    """Repairs the model as far as it was asked for; the error of each layer's outputs before the last repair."""
    args, stage = job.config.prune, REPAIRS.index(job.config.prune.repair)
    if stage == 0:
        return {}
    dense = capture(copy.deepcopy(job.model), job.example, share=True).eval()
    by_node = {each.node.name: each for each in layers}
    how = Repair(weights=stage >= REPAIRS.index("weights"))
    errors = refit(dense, graph, by_node, masks, pruning_images(job), STATS, how)
    if args.repair == "logits":
        match_logits(model, job.model, masks, training_batches(job, BATCH), args.steps)
    return errors


def save_pruned(job: Job, top1: float) -> None:
    """Writes weights and masks. A model without channels is written already. Raises OutputError."""
    if job.config.prune.method in CHANNEL_PRUNERS:
        return
    path = job.file("pruned_checkpoint.pth.tar")
    header = {"arch": job.spec.arch, "dataset": job.dataset_name, "num_classes": job.num_classes}
    extras = {"extras": {"pruned_top1": top1}}
    write_checkpoint(path, {**header, "state_dict": dict(job.model.state_dict()), **saved_masks(job.masks), **extras})
    _log.info("Saving checkpoint to: %s", path)


def report_size(dense: Job, pruned: Job) -> None:
    """Logs what the weights take when they are compressed, and, of zeros among them, what that does not change."""
    before, after = _zipped(dense.model), _zipped(pruned.model)
    note = "" if pruned.config.prune.method in CHANNEL_PRUNERS else f"; {_SPEED}"
    _log.info("Weights, zipped: %.2f MB, %.2f MB before%s", after / 1e6, before / 1e6, note)


def _zipped(model: nn.Module) -> int:
    """Bytes of all weights after zlib."""
    packer = zlib.compressobj(6)
    values = (value.detach().cpu().contiguous().view(-1).view(torch.uint8) for value in model.parameters())
    return sum(len(packer.compress(each.numpy().tobytes())) for each in values) + len(packer.flush())
