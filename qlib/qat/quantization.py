"""The quantizers of a schedule at work: which layer each has in an epoch, and how a layer gets its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlib.checkpoint.fields import TEXT, WEIGHTS, Named, Record, Schema, shown
from qlib.checkpoint.fit import load_state
from qlib.config.layers.settings import LayerSettings
from qlib.config.schedule.types import PolicySpec
from qlib.errors import CheckpointError
from qlib.graph import FoldedGraph, Graph, fold_copy
from qlib.graph.ir import layer_inputs, layers, name_of, parameters_of
from qlib.graph.weights import swap_channels
from qlib.lower.trainable import (
    TrainableLayer,
    WeightQuantizer,
    connect,
    convert,
    prepare_qat,
    trainable_layers,
)
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.qat.assignment import ScheduledQuantizer, planned_settings, scheduled_quantizers
from qlib.qat.drift import MAX_DRIFT, ScaleDrift
from qlib.qat.layer_quantizers import leave_in_float, quantize_layer
from qlib.quant.arithmetic import with_notes
from qlib.quant.plan import LayerPlan, Plan
from qlib.quant.plan_file import check_plan, plan_from_text, plan_text
from qlib.stats.tensor_stats import ModelStats
from qlib.train.optimizers import ParameterGroup
from qlib.train.policy import Batch, Losses, Policy
from qlib.train.saved import REMEDY
from qlib.values import whole

__all__ = ["Calibrate", "Quantization"]

_log = logging.getLogger(__name__)

Calibrate = Callable[[Graph, int], ModelStats]
"""(folded graph, number of images) -> statistics, with histograms, on training images."""


class Quantization(Policy):
    """All quantizers of a schedule, over one graph: `module` is what trains, `graph` holds its float weights.

    A layer is assigned to the quantizer that began last among those that give it bits, until the next one begins; until
    the first one begins it trains in float. Grids start from statistics of training images, taken when a quantizer
    begins.
    """

    def __init__(self, graph: Graph, folded: FoldedGraph, specs: Iterable[PolicySpec], calibrate: Calibrate) -> None:
        self.graph = graph
        self.module = prepare_qat(graph)
        self._calibrate, self._layers = calibrate, folded.layers
        self._scheduled = scheduled_quantizers(specs, folded)
        names = [name for name, _ in trainable_layers(self.module)]
        self._assignment: dict[str, ScheduledQuantizer | None] = dict.fromkeys(names, None)
        self._optimizer: Optimizer | None = None
        self._first_group = 1
        self._epoch = -1
        self._drift, self._warned = ScaleDrift(), False
        self.plan: Plan | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """The float weights that train: those of the model, or parts of them, in the same memory."""
        return [parameter for parameter in parameters_of(self.graph) if parameter.requires_grad]

    @property
    def groups(self) -> list[ParameterGroup]:
        """What the optimizer must know of the parameters of each quantizer."""
        return [ParameterGroup(each.common.lr_factor, each.method.weight_decay) for each in self._scheduled]

    @property
    def settings(self) -> list[tuple[PolicySpec, dict[str, LayerSettings]]]:
        """Each quantizer with its settings of each layer."""
        return [(scheduled.spec, scheduled.settings) for scheduled in self._scheduled]

    def use(self, optimizer: Optimizer, first: int) -> None:
        self._optimizer, self._first_group = optimizer, first

    def convert(self) -> tuple[Graph, Plan] | None:
        """The folded graph and the plan of what has been learned; None while all is in float."""
        return None if self.plan is None else convert(self.graph, self.module, self.plan)

    def on_epoch_begin(self, epoch: int) -> None:
        assignment = self._assignment_in(epoch)
        if assignment != self._assignment:
            before, self._epoch = self._assignment, epoch
            self.plan = self._new_plan(assignment)
            self._attach(assignment, self.plan)
            for scheduled in dict.fromkeys(each for each in assignment.values() if each is not None):
                count = sum(each is scheduled is not before[name] for name, each in assignment.items())
                if count:
                    _log.info("%s quantizes %d layers from epoch %d on", scheduled.spec.component.cls, count, epoch)
        self._freeze_norms(epoch)

    def _assignment_in(self, epoch: int) -> dict[str, ScheduledQuantizer | None]:
        begun = [scheduled for scheduled in self._scheduled if scheduled.spec.start <= epoch]
        begun.sort(key=lambda scheduled: (scheduled.spec.start, scheduled.index))
        return {
            name: next((each for each in reversed(begun) if each.quantizes(name)), None) for name in self._assignment
        }

    def _new_plan(self, assignment: Mapping[str, ScheduledQuantizer | None]) -> Plan:
        folded = fold_copy(self.graph).graph
        quantizers = [scheduled for scheduled in assignment.values() if scheduled is not None]
        images = max(scheduled.common.calibration_images for scheduled in quantizers)
        stats = self._calibrate(folded, images)
        settings = {info.name: planned_settings(assignment.get(info.name), info.name) for info in layer_infos(folded)}
        plan = plan_post_train_linear(folded, settings, stats)
        plans = dict(plan.layers)
        for node, _ in layers(folded):
            scheduled, name = assignment.get(name_of(node)), name_of(node)
            if scheduled is not None:
                inputs = zip(plans[name].inputs, layer_inputs(node), strict=True)
                kept = tuple(None if scheduled.leaves_float(source) else planned for planned, source in inputs)
                plans[name] = replace(plans[name], inputs=kept)
                if self.plan is not None and scheduled is self._assignment[name]:
                    plans[name] = _with_starts_of(self.plan.layers[name], plans[name])
        return with_notes(folded, replace(plan, layers=plans))

    def _attach(self, assignment: dict[str, ScheduledQuantizer | None], plan: Plan) -> None:
        """Gives each layer that is assigned to another quantizer its modules; inputs follow the plan."""
        shared: dict[int, WeightQuantizer] = {}
        nodes = {name_of(node): node for node in self.module.graph.nodes if "name" in node.meta}
        for name, layer in trainable_layers(self.module):
            scheduled = assignment[name]
            if scheduled is None:
                leave_in_float(layer)
                continue
            anew = scheduled is not self._assignment[name]
            quantize_layer(self.module, nodes[name], layer, scheduled, plan.layers[name], shared, anew=anew)
        self._assignment = assignment
        device = next(self.graph.parameters()).device
        self.module.to(device)
        connect(self.module)
        self._drift.watch(self._quantizers())
        self._fill_groups()

    def _quantizers(self) -> dict[str, nn.Module]:
        """All quantizers, as ``LAYER.PART``."""
        return {
            f"{name}.{part}": each
            for name, layer in trainable_layers(self.module)
            for part, each in _parts(layer).items()
        }

    def _fill_groups(self) -> None:
        if self._optimizer is None:
            return
        for scheduled in self._scheduled:
            parts = [part for layer in self._layers_of(scheduled) for part in _parts(layer).values()]
            mine = [parameter for part in parts for parameter in part.parameters()]
            group = self._optimizer.param_groups[self._first_group + scheduled.index]
            kept = set(mine)
            for parameter in group["params"]:
                if parameter not in kept:
                    self._optimizer.state.pop(parameter, None)
            group["params"] = list(dict.fromkeys(mine))

    def _layers_of(self, scheduled: ScheduledQuantizer) -> list[TrainableLayer]:
        return [layer for name, layer in trainable_layers(self.module) if self._assignment[name] is scheduled]

    def _freeze_norms(self, epoch: int) -> None:
        for scheduled in self._scheduled:
            frozen = scheduled.common.freeze_bn_epoch
            for layer in self._layers_of(scheduled) if frozen is not None and epoch >= frozen else []:
                if layer.norm is not None:
                    layer.norm.eval()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        name, factor = self._drift.worst()
        if factor > MAX_DRIFT and not self._warned:
            self._warned = True
            _log.warning(
                "Warning: the step of %s has moved by a factor of %.3g since it began: steps learn too fast; lower the"
                " quantizer's lr_factor (0.1 under a distillation loss of temperature 4), or --lr",
                name,
                factor,
            )

    def before_backward(self, batch: Batch, logits: Tensor, losses: Losses) -> Losses:
        for scheduled in self._scheduled:
            if scheduled.common.dampening:
                terms = [_distance(layer) for layer in self._layers_of(scheduled) if layer.weight is not None]
                if terms:
                    losses = losses.plus("Dampening Loss", scheduled.common.dampening * torch.stack(terms).sum())
        return losses

    @property
    def saved_fields(self) -> Schema:
        return Record({"epoch": whole(-1), "plan": TEXT.or_null("or null"), "modules": Named(WEIGHTS)})

    def state_dict(self) -> dict[str, Any]:
        modules = {name: dict(module.state_dict()) for name, module in self._quantizers().items()}
        return {"epoch": self._epoch, "plan": None if self.plan is None else plan_text(self.plan), "modules": modules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["plan"] is None:
            return
        self._epoch, self.plan = state["epoch"], plan_from_text(state["plan"], "the checkpoint's plan")
        check_plan(self.plan, self._layers, "the checkpoint's plan")
        self._attach(self._assignment_in(self._epoch), self.plan)
        for name, module in self._quantizers().items():
            load_state(module, state["modules"][name], f"the quantizer {name} in the checkpoint", "give another one")
            if bad := _no_grid(module):
                raise CheckpointError(f"the quantizer {name} in the checkpoint has the {bad}; {REMEDY}")


def _with_starts_of(before: LayerPlan, now: LayerPlan) -> LayerPlan:
    """The plan of a layer that keeps its quantizers, with the grids that they started from."""
    inputs = tuple(new and (old or new) for old, new in zip(before.inputs, now.inputs, strict=True))
    return replace(now, inputs=inputs, output=now.output and (before.output or now.output))


def _no_grid(module: nn.Module) -> str | None:
    """What of a quantizer's state gives no grid: NaN, infinity, or a scale that is not positive and does not learn."""
    for name, value in module.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            return f"{name} {shown(value)} with NaN or infinity"
    for name, value in module.named_buffers():
        if name in ("scale", "unit") and not bool((value > 0).all()):
            return f"{name} {float(value.min()):g}; allowed: above 0"
    return None


def _parts(layer: TrainableLayer) -> dict[str, nn.Module]:
    """The quantizers of a layer, by what they quantize."""
    inputs = {f"input{index}": each for index, each in enumerate(layer.inputs) if not isinstance(each, nn.Identity)}
    others = {"weight": layer.weight, "output": layer.output, "gradient": layer.gradient}
    return {**inputs, **{part: module for part, module in others.items() if module is not None}}


def _distance(layer: TrainableLayer) -> Tensor:
    """``sum (w - Q(w))^2`` over the weights that are not clipped."""
    weight = cast(Tensor, layer.module.weight)
    with torch.no_grad():
        rounded, scale = layer.rounded_weight()
        shape = [-1 if scale.ndim and not axis else 1 for axis in range(weight.ndim)]
        inside = swap_channels(layer.module, (weight - rounded).abs()) <= 0.5 * scale.view(shape)
        inside = swap_channels(layer.module, inside)
    return ((weight - rounded).square() * inside).sum()
