"""The quantizers of a schedule at work: which layer each has in an epoch, and how a layer gets its own."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from qlib.config.resolve import resolve
from qlib.config.schedule import PolicySpec
from qlib.config.settings import LayerSettings, PtqConfig, Rule
from qlib.errors import ConfigError
from qlib.graph import Graph, fold_batch_norm, kind_of
from qlib.graph.ir import layer_inputs, layers, name_of, tensor_users
from qlib.graph.ops import ChannelAffine
from qlib.job import FoldedGraph
from qlib.lower.ops.weighted import swap_channels
from qlib.lower.trainable import (
    ActivationQuantizer,
    FixedActivation,
    TrainableLayer,
    WeightQuantizer,
    connect,
    deployed,
    lower_trainable,
    trainable_layers,
)
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.plan_file import plan_from_text, plan_text
from qlib.quantizers import layer_infos, plan_post_train_linear
from qlib.quantizers.training import TRAINING_QUANTIZERS, ActivationSite, TrainingQuantizer, WeightSite
from qlib.quantizers.weight_ranges import plan_weight
from qlib.stats.tensor_stats import ModelStats
from qlib.train.optimizers import Group
from qlib.train.policy import Batch, Losses, Policy

__all__ = ["Calibrate", "Quantization"]

_log = logging.getLogger(__name__)

Calibrate = Callable[[Graph, int], ModelStats]
"""(folded graph, number of images) -> statistics, with histograms, on training images."""
_RELU_ONLY = frozenset({"DorefaQuantizer", "PACTQuantizer", "WRPNQuantizer"})
"""Methods whose papers quantize what leaves a ReLU alone; `edges: all` quantizes the rest linearly."""


@dataclass(frozen=True)
class Common:
    """The keys that every quantizer of a schedule has.

    `edges`: which outputs are quantized, all or those of ReLUs; None is the method's own choice. `bits_first_last`:
    bits of the first and the last layer with weights, and of the last one's input, where others have bits.
    `calibration_images`: how many the first ranges come from. `dampening` holds weights near their grid (Nagel et al.,
    "Overcoming oscillations", 2022, section 4.1). From `freeze_bn_epoch` on batch-norms use their running statistics.
    """

    bits_activations: int = 0
    bits_weights: int = 0
    bits_bias: int = 32
    edges: str | None = None
    rounding: str = "nearest"
    calibration_images: int = 256
    lr_factor: float = 1.0
    dampening: float = 0.0
    bits_first_last: int | None = None
    freeze_bn_epoch: int | None = None


class _Claim:
    """A quantizer of the schedule, and what it wants of each layer."""

    def __init__(self, index: int, spec: PolicySpec, folded: FoldedGraph) -> None:
        component = spec.component
        self.index, self.spec = index, spec
        names = {each.name for each in dataclasses.fields(Common)}
        given = {key: value for key, value in component.settings.items() if key in names}
        self.common = Common(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        own = {key: value for key, value in component.settings.items() if key not in names}
        self.method: TrainingQuantizer = TRAINING_QUANTIZERS[component.cls](**own)
        self.relu_only = (self.common.edges or ("relu" if component.cls in _RELU_ONLY else "all")) == "relu"
        self.settings = self._resolved(component.rules, folded)

    def _resolved(self, rules: Sequence[Rule], folded: FoldedGraph) -> dict[str, LayerSettings]:
        given = {key: getattr(self.common, key) for key in ("bits_activations", "bits_weights", "bits_bias")}
        given |= {**self.method.planning, "per_channel_wts": getattr(self.method, "per_channel_wts", False)}
        defaults = LayerSettings().with_settings(given, dict.fromkeys(given, Path(self.spec.component.where).name))
        all_rules = (*rules, *self._ends(folded.graph))
        absorbed = {**_later_relus(folded.graph), **folded.absorbed}
        found = resolve(PtqConfig(defaults, all_rules), layer_infos(folded.graph), absorbed)
        self._check_bits(found)
        for node, module in layers(folded.graph):
            if isinstance(module, ChannelAffine) and found[name_of(node)].bits_weights:
                # One weight a channel is exact on any grid; on that of 8 bits its bias is nearly so.
                found[name_of(node)] = replace(found[name_of(node)], bits_weights=8)
        if self.relu_only:
            ending = {name_of(node) for node, _ in layers(folded.graph) if _ends_in_relu(folded.graph, node)}
            found = {n: s if n in ending else replace(s, bits_activations=0) for n, s in found.items()}
        return found

    def _check_bits(self, settings: Mapping[str, LayerSettings]) -> None:
        least, cls = self.method.least_bits, self.spec.component.cls
        for name, each in settings.items():
            if 0 < each.bits_weights < least:
                raise ConfigError(
                    f"{each.origin_of('bits_weights')}: bits_weights of {name!r} is {each.bits_weights}, but {cls}"
                    f" needs {least} or more; BinaryConnectQuantizer and XNORQuantizer have weights of 1 bit"
                )

    def _ends(self, graph: Graph) -> list[Rule]:
        """Rules for the first and the last layer with weights; those of the file come before them."""
        bits = self.common.bits_first_last
        weighted = [node for node, module in layers(graph) if kind_of(module) in ("conv", "linear")]
        if bits is None or not weighted:
            return []
        acts = {"bits_activations": bits} if self.common.bits_activations else {}
        wanted = {node: {"bits_weights": bits, **acts} for node in (weighted[0], weighted[-1])}
        source = _producer(graph, weighted[-1])
        if source is not None and acts:
            wanted.setdefault(source, acts)
        where = Path(self.spec.component.where).name
        return [Rule(re.escape(name_of(node)), settings, {}, where) for node, settings in wanted.items()]

    def leaves_float(self, source: fx.Node) -> bool:
        """Whether a layer computes with what arrives from `source` in float, and not on a grid of its own."""
        if self.relu_only:
            return True
        while source.op not in ("placeholder", "get_attr", "call_module"):
            source = source.all_input_nodes[0]
        return source.op == "placeholder" and not getattr(self.method, "quantize_inputs", True)

    def wants(self, name: str) -> bool:
        """Whether it quantizes anything of a layer."""
        settings = self.settings[name]
        return bool(settings.bits_weights or settings.bits_activations)


def _ends_in_relu(graph: Graph, node: fx.Node) -> bool:
    """Whether all that leaves a layer goes through a ReLU, behind nothing but moves and max pools."""
    users = tensor_users(node)
    return bool(users) and all(_is_relu_later(graph, user) for user in users)


def _is_relu_later(graph: Graph, node: fx.Node) -> bool:
    kind = kind_of(graph.get_submodule(str(node.target))) if node.op == "call_module" else "move"
    if kind == "relu":
        return True
    return node.op != "output" and kind in ("max_pool", "move") and _ends_in_relu(graph, node)


def _producer(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The layer that gives the first input of `node` its grid: behind moves, ReLUs and max pools."""
    source = next((each for each in node.all_input_nodes if each.meta["tensor"]), None)
    while source is not None and source.op != "placeholder":
        kind = kind_of(graph.get_submodule(str(source.target))) if source.op == "call_module" else "move"
        if kind not in ("relu", "max_pool", "move"):
            return source
        source = next((each for each in source.all_input_nodes if each.meta["tensor"]), None)
    return None


def _later_relus(graph: Graph) -> dict[str, str]:
    """ReLUs that no layer takes in -> the layer before them: a rule for the ReLU says what leaves that layer."""
    found = {}
    for node, module in layers(graph):
        source = _producer(graph, node) if kind_of(module) == "relu" else None
        if source is not None:
            found[name_of(node)] = name_of(source)
    return found


class Quantization(Policy):
    """All quantizers of a schedule, over one graph: `module` is what trains, `graph` holds its float weights.

    A layer belongs to the quantizer that began last among those that give it bits, and keeps it until the next one
    begins; until the first one begins it trains in float. Grids start from statistics of training images, taken when a
    quantizer begins.
    """

    def __init__(self, graph: Graph, folded: FoldedGraph, specs: Iterable[PolicySpec], calibrate: Calibrate) -> None:
        self.graph = graph
        self.module = lower_trainable(graph)
        self._calibrate = calibrate
        self._claims = _claims(specs, folded)
        self._owners: dict[str, _Claim | None] = dict.fromkeys(
            (name for name, _ in trainable_layers(self.module)), None
        )
        self._optimizer: Optimizer | None = None
        self._epoch = -1
        self.plan: Plan | None = None

    @property
    def groups(self) -> list[Group]:
        """What the optimizer must know of the parameters of each quantizer."""
        return [Group(claim.common.lr_factor, claim.method.weight_decay) for claim in self._claims]

    @property
    def settings(self) -> list[tuple[PolicySpec, dict[str, LayerSettings]]]:
        """Each quantizer with its settings of each layer."""
        return [(claim.spec, claim.settings) for claim in self._claims]

    def use(self, optimizer: Optimizer) -> None:
        """The optimizer, made with `groups` behind the group of the weights, into which parameters are put."""
        self._optimizer = optimizer

    def deployed(self) -> tuple[Graph, Plan] | None:
        """The folded graph and the plan of what has been learned; None while all is in float."""
        return None if self.plan is None else deployed(self.graph, self.module, self.plan)

    def on_epoch_begin(self, epoch: int) -> None:
        owners = self._owners_in(epoch)
        if owners != self._owners:
            before, self._epoch = self._owners, epoch
            self.plan = self._new_plan(owners)
            self._attach(owners, self.plan)
            for claim in dict.fromkeys(each for each in owners.values() if each is not None):
                names = [name for name, owner in owners.items() if owner is claim and before[name] is not claim]
                if names:
                    _log.info("%s quantizes %d layers from epoch %d on", claim.spec.component.cls, len(names), epoch)
        self._freeze_norms(epoch)

    def _owners_in(self, epoch: int) -> dict[str, _Claim | None]:
        begun = [claim for claim in self._claims if claim.spec.start <= epoch]
        begun.sort(key=lambda claim: (claim.spec.start, claim.index))
        return {name: next((c for c in reversed(begun) if c.wants(name)), None) for name in self._owners}

    def _new_plan(self, owners: Mapping[str, _Claim | None]) -> Plan:
        folded = copy.deepcopy(self.graph)
        fold_batch_norm(folded)
        claims = [claim for claim in owners.values() if claim is not None]
        images = max(claim.common.calibration_images for claim in claims)
        stats = self._calibrate(folded, images)
        settings = {info.name: _planned(owners.get(info.name), info.name) for info in layer_infos(folded)}
        plan = plan_post_train_linear(folded, settings, stats)
        plans = dict(plan.layers)
        for node, _ in layers(folded):
            claim, name = owners.get(name_of(node)), name_of(node)
            if claim is not None:
                inputs = zip(plans[name].inputs, layer_inputs(node), strict=True)
                kept = tuple(None if claim.leaves_float(source) else planned for planned, source in inputs)
                plans[name] = replace(plans[name], inputs=kept)
        return replace(plan, layers=plans)

    def _attach(self, owners: dict[str, _Claim | None], plan: Plan) -> None:
        """Gives each layer whose owner has changed its quantizers; inputs follow the plan."""
        shared: dict[int, WeightQuantizer] = {}
        nodes = {name_of(node): node for node in self.module.graph.nodes if "name" in node.meta}
        for name, layer in trainable_layers(self.module):
            claim = owners[name]
            builder = None if claim is None else _Builder(claim, self.module, nodes[name], layer, plan.layers[name])
            changed = claim is not self._owners[name]
            if builder is None:
                layer.weight, layer.output, layer.gradient = None, None, None
            elif changed:
                layer.weight = shared.setdefault(id(layer.module), weight) if (weight := builder.weight()) else None
                layer.output, layer.gradient = builder.output(), builder.gradient()
            for index in range(len(layer.inputs)):
                planned = plan.layers[name].inputs[index] if builder else None
                if planned is None:
                    layer.inputs[index] = nn.Identity()
                elif builder and (changed or isinstance(layer.inputs[index], nn.Identity)):
                    layer.inputs[index] = builder.input(index, planned)
        self._owners = owners
        device = next(self.graph.parameters()).device
        self.module.to(device)
        connect(self.module)
        self._fill_groups()

    def _fill_groups(self) -> None:
        if self._optimizer is None:
            return
        for claim in self._claims:
            mine = [p for layer in self._layers_of(claim) for part in _parts(layer).values() for p in part.parameters()]
            group = self._optimizer.param_groups[1 + claim.index]
            kept = set(mine)
            for parameter in group["params"]:
                if parameter not in kept:
                    self._optimizer.state.pop(parameter, None)
            group["params"] = list(dict.fromkeys(mine))

    def _layers_of(self, claim: _Claim) -> list[TrainableLayer]:
        return [layer for name, layer in trainable_layers(self.module) if self._owners[name] is claim]

    def _freeze_norms(self, epoch: int) -> None:
        for claim in self._claims:
            frozen = claim.common.freeze_bn_epoch
            for layer in self._layers_of(claim) if frozen is not None and epoch >= frozen else []:
                if layer.norm is not None:
                    layer.norm.eval()

    def before_backward(self, batch: Batch, logits: Tensor, losses: Losses) -> Losses:
        for claim in self._claims:
            if claim.common.dampening:
                terms = [_distance(layer) for layer in self._layers_of(claim) if layer.weight is not None]
                if terms:
                    losses = losses.plus("Dampening Loss", claim.common.dampening * torch.stack(terms).sum())
        return losses

    def state_dict(self) -> dict[str, Any]:
        modules = {
            f"{name}.{part}": dict(module.state_dict())
            for name, layer in trainable_layers(self.module)
            for part, module in _parts(layer).items()
        }
        return {"epoch": self._epoch, "plan": None if self.plan is None else plan_text(self.plan), "modules": modules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["plan"] is None:
            return
        self._epoch, self.plan = int(state["epoch"]), plan_from_text(state["plan"], "the checkpoint's plan")
        self._attach(self._owners_in(self._epoch), self.plan)
        for name, layer in trainable_layers(self.module):
            for part, module in _parts(layer).items():
                module.load_state_dict(state["modules"][f"{name}.{part}"])


def _claims(specs: Iterable[PolicySpec], folded: FoldedGraph) -> list[_Claim]:
    """The quantizers, with the mistakes of all of them at once."""
    claims, problems = list[_Claim](), list[str]()
    for index, spec in enumerate(specs):
        try:
            claims.append(_Claim(index, spec, folded))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return claims


def _planned(claim: _Claim | None, name: str) -> LayerSettings:
    """The settings that a layer's grids are planned with: 1 bit has no range of its own, and starts from that of 2."""
    if claim is None:
        return LayerSettings(bits_activations=0, bits_weights=0)
    settings = claim.settings[name]
    acts, weights = settings.bits_activations, settings.bits_weights
    return replace(settings, bits_activations=acts and max(acts, 2), bits_weights=weights and max(weights, 2))


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


@dataclass(frozen=True, eq=False)
class _Builder:
    """Makes the quantizers of one layer."""

    claim: _Claim
    graph: Graph
    node: fx.Node
    layer: TrainableLayer
    plan: LayerPlan

    @property
    def settings(self) -> LayerSettings:
        return self.claim.settings[name_of(self.node)]

    def weight(self) -> WeightQuantizer | None:
        """None too for a batch-norm that stands alone: one weight a channel is exact on any grid."""
        weight = getattr(self.layer.module, "weight", None)
        if self.plan.weight is None or not isinstance(weight, Tensor) or weight.ndim < 2:
            return None
        settings, gain = self.settings, self.layer.gain()
        weight = swap_channels(self.layer.module, weight.detach())
        start = self._start(weight)
        stochastic = self.claim.common.rounding == "stochastic"
        site = WeightSite(weight, settings.bits_weights, settings.per_channel_wts, start, stochastic)
        quantizer = self.claim.method.weight(site)
        if quantizer.folds and gain is not None:
            folded = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            quantizer = self.claim.method.weight(replace(site, weight=folded, start=self._start(folded)))
        return quantizer

    def _start(self, weight: Tensor) -> QParams:
        settings = self.settings
        plan = WeightPlan(max(settings.bits_weights, 2), settings.mode_weights, settings.per_channel_wts)
        planned = plan_weight(plan, weight, settings.clip_wts, settings.clip_percentile, settings.clip_p)
        return planned.qparams(weight)

    def output(self) -> ActivationQuantizer | None:
        if self.plan.output is None:
            return None
        start = self.plan.output.qparams()
        if self.plan.kind == "softmax":
            return FixedActivation(start)
        relu = self.layer.activation is not None or _ends_in_relu(self.graph, self.node)
        return self.claim.method.activation(ActivationSite(self.settings.bits_activations, start, relu))

    def input(self, index: int, planned: TensorPlan) -> ActivationQuantizer:
        """The quantizer of what arrives in float: the images, a constant, or what another layer left so."""
        source = [each for each in self.node.all_input_nodes if each.meta["tensor"]][index]
        while source.op not in ("placeholder", "get_attr", "call_module"):
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            return FixedActivation(planned.qparams())
        site = ActivationSite(self.settings.bits_activations, planned.qparams(), False, source.op == "placeholder")
        return self.claim.method.activation(site)

    def gradient(self) -> nn.Module | None:
        return self.claim.method.gradient() if self.plan.weight is not None else None
