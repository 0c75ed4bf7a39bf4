"""The assignment of quantizers to layers: what each quantizer of a schedule does with each layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from qlib.config.layers.keys import whole
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig, Rule
from qlib.config.schedule.keys import FROM_0, POSITIVE, ClassFields, count, key, keys_of, one_of
from qlib.config.schedule.types import PolicySpec
from qlib.errors import ConfigError
from qlib.graph import FoldedGraph, Graph
from qlib.graph.ir import is_layer, layer_inputs, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.ops import ChannelAffine
from qlib.graph.walk import producer_of
from qlib.ptq.planner import layer_infos
from qlib.qat.base import TRAINING_QUANTIZERS, TrainingQuantizer
from qlib.qat.quantized_tensors import ends_in_relu, later_relus, on_inputs

__all__ = ["CommonArguments", "ScheduledQuantizer", "planned_settings", "quantizer_classes", "scheduled_quantizers"]


@dataclass(frozen=True)
class CommonArguments:
    """The keys that every quantizer of a schedule has.

    `edges`: which tensors have `bits_activations`: the outputs of all layers, those of ReLUs alone, or the inputs of
    layers with weights, each on a grid of its own; None is the method's own choice. `bits_first_last`: bits of the
    first and the last layer with weights, and of the last one's input, where others have bits. `bits_other_edges`: bits
    of outputs that go through no ReLU, such as those that are added, without it those of all; under `inputs` those of
    all tensors that not only layers with weights read, without it 8.
    `calibration_images`: how many the first ranges come from. `dampening` holds weights near their grid (Nagel et al.,
    "Overcoming oscillations", 2022, section 4.1). From `freeze_bn_epoch` on batch-norms use their running statistics.
    """

    bits_activations: int = key(0, whole(1, 16, null=0, zero=True))
    bits_weights: int = key(0, whole(1, 16, null=0, zero=True))
    bits_bias: int = key(32, whole(2, 32, null=32))
    edges: str | None = key(None, one_of("relu", "all", "inputs"))
    rounding: str = key("nearest", one_of("nearest", "stochastic"))
    calibration_images: int = key(256, count(1))
    lr_factor: float = key(1.0, POSITIVE)
    dampening: float = key(0.0, FROM_0)
    bits_first_last: int | None = key(None, whole(1, 16, null=None))
    bits_other_edges: int | None = key(None, whole(2, 16, null=None))
    freeze_bn_epoch: int | None = key(None, count(0, null=True))


def quantizer_classes() -> dict[str, ClassFields]:
    """The arguments of each class of quantizer in a schedule, those common to all first."""
    common = keys_of(CommonArguments)
    return {name: ClassFields({**common, **keys_of(TRAINING_QUANTIZERS[name])}) for name in TRAINING_QUANTIZERS}


class ScheduledQuantizer:
    """A quantizer of the schedule, with the settings that it gives each layer.

    `tensors` says which ones have the bits of activations, as `edges` in YAML: those of all outputs, of ReLUs alone, or
    the inputs of layers with weights.
    """

    def __init__(self, index: int, spec: PolicySpec, folded: FoldedGraph) -> None:
        component = spec.component
        self.index, self.spec = index, spec
        names = {each.name for each in dataclasses.fields(CommonArguments)}
        given = {key: value for key, value in component.settings.items() if key in names and value is not None}
        self.common = CommonArguments(**given)  # type: ignore[arg-type]
        own = {key: value for key, value in component.settings.items() if key not in names}
        self.method: TrainingQuantizer = TRAINING_QUANTIZERS[component.cls](**own)
        self.tensors = self.common.edges or ("relu" if self.method.only_relus else "all")
        self.settings = self._resolved(component.rules, folded)

    def _resolved(self, rules: Sequence[Rule], folded: FoldedGraph) -> dict[str, LayerSettings]:
        given = {key: getattr(self.common, key) for key in ("bits_activations", "bits_weights", "bits_bias")}
        given |= {**self.method.planning, "per_channel_wts": self.method.per_channel_wts}
        defaults = LayerSettings().with_settings(given, dict.fromkeys(given, Path(self.spec.component.where).name))
        ours = {**self._other_outputs(folded.graph), **self._ends(folded.graph)}
        where = Path(self.spec.component.where).name
        infos, absorbed = layer_infos(folded.graph), {**later_relus(folded.graph), **folded.absorbed}
        matched = [(rule, rule.matched([*(info.name for info in infos), *absorbed])) for rule in rules]
        named = frozenset[str]().union(*(names for _, names in matched))  # the file has the last word
        more = [Rule(re.escape(name), settings, {}, where) for name, settings in ours.items() if name not in named]
        found = resolve(PtqConfig(defaults, (*rules, *more)), infos, absorbed)
        self._check_bits(found)
        if self.tensors == "inputs":
            _check_names(matched, found.keys() - absorbed.keys())
        for node, module in layers(folded.graph):
            if isinstance(module, ChannelAffine) and found[name_of(node)].bits_weights:
                # One weight a channel is exact on any grid; on that of 8 bits its bias is nearly so.
                found[name_of(node)] = replace(found[name_of(node)], bits_weights=8)
        if self.tensors == "inputs":
            found = on_inputs(folded.graph, found, self.common.bits_other_edges or 8, where)
        if self.tensors == "relu":
            ending = {name_of(node) for node, _ in layers(folded.graph) if ends_in_relu(folded.graph, node)}
            found = {n: s if n in ending else replace(s, bits_activations=0) for n, s in found.items()}
        return found

    def _check_bits(self, settings: Mapping[str, LayerSettings]) -> None:
        min_bits, cls = self.method.min_bits, self.spec.component.cls
        for name, each in settings.items():
            if 0 < each.bits_weights < min_bits:
                raise ConfigError(
                    f"{each.origin_of('bits_weights')}: bits_weights of {name!r} is {each.bits_weights}, but {cls}"
                    f" needs {min_bits} or more; BinaryConnectQuantizer and XNORQuantizer have weights of 1 bit"
                )

    def _ends(self, graph: Graph) -> dict[str, dict[str, int]]:
        """Settings of the first and the last layer with weights, and of what gives the last one its input."""
        bits = self.common.bits_first_last
        weighted = [node for node, module in layers(graph) if layer_kind(module).affine]
        if bits is None or not weighted:
            return {}
        acts = {"bits_activations": bits} if self.common.bits_activations else {}
        wanted = {name_of(node): {"bits_weights": bits, **acts} for node in (weighted[0], weighted[-1])}
        source = producer_of(graph, layer_inputs(weighted[-1])[0])
        if is_layer(graph, source) and acts and self.tensors != "inputs":
            wanted.setdefault(name_of(source), acts)
        return wanted

    def _other_outputs(self, graph: Graph) -> dict[str, dict[str, int]]:
        """Settings of the layers whose outputs go through no ReLU."""
        bits = self.common.bits_other_edges
        if bits is None or not self.common.bits_activations or self.tensors == "inputs":
            return {}
        others = [node for node, module in layers(graph) if not layer_kind(module).keeps_grid]
        return {name_of(node): {"bits_activations": bits} for node in others if not ends_in_relu(graph, node)}

    def leaves_float(self, source: fx.Node) -> bool:
        """Whether a layer computes with what arrives from `source` in float, and not on a grid of its own."""
        if self.tensors == "relu":
            return True
        while source.op not in ("placeholder", "get_attr", "call_module"):
            source = source.all_input_nodes[0]
        return source.op == "placeholder" and not self.method.quantize_inputs

    def quantizes(self, name: str) -> bool:
        """Whether it quantizes anything of a layer."""
        settings = self.settings[name]
        return bool(settings.bits_weights or settings.bits_activations)


def _check_names(matched: Sequence[tuple[Rule, Set[str]]], reading: Set[str]) -> None:
    """Raises ConfigError for rules that give activation bits to modules whose outputs have those of their readers."""
    problems = [
        f"{rule.where}: {rule.pattern!r} matches ReLUs and batch-norms alone, which have no bits under edges: inputs;"
        " name the layers that read what leaves them"
        for rule, names in matched
        if "bits_activations" in rule.settings and names.isdisjoint(reading)
    ]
    if problems:
        raise ConfigError(problems)


def scheduled_quantizers(specs: Iterable[PolicySpec], folded: FoldedGraph) -> list[ScheduledQuantizer]:
    """The quantizers, with the mistakes of all of them at once."""
    quantizers, problems = list[ScheduledQuantizer](), list[str]()
    for index, spec in enumerate(specs):
        try:
            quantizers.append(ScheduledQuantizer(index, spec, folded))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return quantizers


def planned_settings(scheduled: ScheduledQuantizer | None, name: str) -> LayerSettings:
    """The settings that a layer's grids are planned with: 1 bit has no range of its own, and starts from that of 2."""
    if scheduled is None:
        return LayerSettings(bits_activations=0, bits_weights=0)
    settings = scheduled.settings[name]
    acts, weights = settings.bits_activations, settings.bits_weights
    inputs = {
        index: {"bits_activations": max(settings.of_input(index).bits_activations, 2)}
        for index in settings.input_overrides
    }
    bits = replace(settings, bits_activations=acts and max(acts, 2), bits_weights=weights and max(weights, 2))
    return replace(bits, input_overrides=inputs)
