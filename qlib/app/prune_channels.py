"""Pruning of channels without training: order, choose under a budget, repair what reads them, thin."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qlib.app.images import training_batches
from qlib.app.job import Job
from qlib.app.prune_images import BATCH, IMPORTANCE, pruning_images
from qlib.app.report import record
from qlib.app.thin import hand_over_thinned
from qlib.config.flags.pruning import CHANNEL_PRUNERS as FACTS
from qlib.config.flags.pruning import REPAIRS, ChannelBudget
from qlib.errors import UsageError
from qlib.files import STATS
from qlib.graph import Graph
from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.graph.coordinates_cost import class_costs
from qlib.prune.budget import removed_for
from qlib.prune.channels._base import CHANNEL_PRUNERS, Consumer
from qlib.prune.importance import output_importance
from qlib.prune.layers import PrunedLayer, chosen_layers, prunable_layers
from qlib.prune.logits import match_logits
from qlib.prune.refit import Repair, refit, survey
from qlib.report.pruning import channels_table, pruned_channels
from qlib.surgery.recipe_file import trainable_graph
from qlib.surgery.thin import masked, thin

__all__ = ["prune_channels"]

_log = logging.getLogger(__name__)


def prune_channels(job: Job) -> Job:
    """The job with a model of fewer channels, which is saved.

    Raises UsageError where the budget cannot be met, or where names match nothing.
    """
    args = job.config.prune
    graph = trainable_graph(copy.deepcopy(job.model), job.example).eval()
    classes = channel_classes(graph)
    layers = prunable_layers(graph, graph)
    ranges = _ranges(job, classes, layers)
    consumers = list(_consumers(job, graph, classes, layers))
    assert args.method is not None
    orders = CHANNEL_PRUNERS[args.method](ranges, consumers)
    removed = _within_budget(job, graph, classes, orders)
    kept = pruned_channels(classes, ranges, removed)
    record(job, pruned=kept)
    _log.info("%s", channels_table(kept))
    _repair(job, graph, classes, layers, removed)
    return hand_over_thinned(job, thin(graph, removed, classes))


def _ranges(job: Job, classes: ChannelClasses, layers: Sequence[PrunedLayer]) -> list[range]:
    """The classes that may go, those of the same axes together: all, or those that the chosen layers make."""
    chosen = chosen_layers(layers, job.config.prune.layers, "--prune-layers")
    made = torch.zeros(classes.count + 1, dtype=torch.bool)
    for each in chosen:
        found = classes.of(each.parameter, 0)
        if found is not None:
            made[found] = True
    return [numbers for numbers, _ in classes.rows() if bool(made[list(numbers)].all()) and len(numbers) > 1]


def _consumers(job: Job, graph: Graph, classes: ChannelClasses, layers: Sequence[PrunedLayer]) -> Iterator[Consumer]:
    """Who reads channels: layers without groups, as what a group reads goes with what it makes."""
    method = job.config.prune.method
    assert method is not None
    reading = [each for each in layers if _columns(classes, each) is not None]
    looks = FACTS[method]
    importance = output_importance(graph, reading, pruning_images(job, IMPORTANCE), job.config.seed) if looks else {}
    seen = survey(graph, reading, pruning_images(job), STATS) if looks else ((each, None) for each in reading)
    for layer, moments in seen:
        columns, (rows,) = _columns(classes, layer), layer.rows
        assert columns is not None
        unit = torch.eye(rows.shape[1], dtype=torch.float64)
        outputs = importance.get(layer.node.name, torch.ones(len(rows)))
        yield Consumer(rows, unit if moments is None else moments[0], outputs, columns)


def _columns(classes: ChannelClasses, layer: PrunedLayer) -> Tensor | None:
    """The class of each column of a layer's weight; None where it reads no channel that may go, or in groups."""
    found = classes.of(layer.parameter, 1) if getattr(layer.module, "groups", 1) == 1 else None
    return None if found is None else found.repeat_interleave(layer.inputs[1])


def _within_budget(
    job: Job, graph: Graph, classes: ChannelClasses, orders: Sequence[Sequence[tuple[int, float]]]
) -> list[int]:
    """The classes that go. Raises UsageError, which says the nearest, where the budget cannot be met."""
    args = job.config.prune
    assert args.budget is not None
    budget, costs = ChannelBudget.of(args.budget), class_costs(graph, classes)
    cost = costs.total_macs if budget.of_macs else costs.total_parameters
    whole = cost(classes.keeps([]))
    removed = removed_for(orders, classes.count, cost, budget.limit(whole), args.round_to)
    if removed is None:
        least = classes.keeps(number for order in orders for number, _ in order[: _most(len(order), args.round_to)])
        raise UsageError(
            f"--prune-budget {args.budget} cannot be met: with the fewest channels that may stay it is"
            f" {budget.text(cost(least), whole)}; raise it, lower --prune-round-to, or choose more --prune-layers"
        )
    return removed


def _most(order: int, round_to: int) -> int:
    """How many of a range can go."""
    return order + 1 - round_to if order + 1 >= round_to else 0


def _repair(
    job: Job, graph: Graph, classes: ChannelClasses, layers: Sequence[PrunedLayer], removed: Sequence[int]
) -> None:
    """Sets what goes to zero, and repairs the rest of the graph as far as it was asked for."""
    dense = trainable_graph(copy.deepcopy(job.model), job.example).eval()
    graph.load_state_dict(masked(graph.state_dict(), classes, removed))
    stage = REPAIRS.index(job.config.prune.repair)
    masks = {name: value != 0 for name, value in masked(_ones(graph), classes, removed).items()}
    if stage:
        how = Repair(weights=stage >= REPAIRS.index("weights"))
        refit(dense, graph, {each.node.name: each for each in layers}, masks, pruning_images(job), STATS, how)
    if job.config.prune.repair == "logits":
        gone = {name: masks[name] for name, _ in graph.named_parameters()}
        match_logits(graph, job.model, gone, training_batches(job, BATCH), job.config.prune.steps)


def _ones(graph: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(value) for name, value in graph.state_dict().items()}
