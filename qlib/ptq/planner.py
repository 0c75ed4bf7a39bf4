"""Post-training linear quantization: ranges from statistics, or from each image (dynamic)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.config.layers.resolve import LayerInfo
from qlib.config.layers.settings import LayerSettings
from qlib.errors import ConfigError, StatsError
from qlib.graph import Graph, fused_activations
from qlib.graph.ir import (
    attribute,
    is_constant,
    is_layer,
    layer_inputs,
    layers,
    name_of,
    source_of,
    tensor_users,
)
from qlib.graph.kinds import KINDS, LayerKind, layer_kind
from qlib.graph.ops import ChannelAffine, Function
from qlib.graph.walk import producer_of, readers_of, sole_producer
from qlib.graph.weights import swap_channels
from qlib.ptq.activation_ranges import clipped, constant_plan, dynamic_plan, plan_tensor, request_of, softmax_plan
from qlib.ptq.weight_ranges import plan_weight
from qlib.quant.arithmetic import NOT_DYNAMIC, with_notes
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats

__all__ = ["layer_infos", "plan_post_train_linear"]

_NO_ZERO: dict[Callable[..., Any], int] = {
    torch.ops.aten.div.Tensor: 1,
    torch.ops.aten.reciprocal.default: 0,
    torch.ops.aten.rsqrt.default: 0,
    torch.ops.aten.log.default: 0,
}
"""Functions that have no value where an input of theirs is 0, and which input that is."""

_SATURATING = ((nn.Sigmoid, 6.0), (nn.Tanh, 4.0))


def layer_infos(graph: Graph) -> list[LayerInfo]:
    """The layers of a graph, as the settings are resolved against them."""
    found = {name_of(node): (layer_kind(module), len(layer_inputs(node))) for node, module in layers(graph)}
    return [LayerInfo(name, kind.name, kind.weighted, inputs) for name, (kind, inputs) in found.items()]


def plan_post_train_linear(
    graph: Graph,
    settings: Mapping[str, LayerSettings],
    stats: ModelStats | None,
    folded: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of every layer of a folded graph; dynamic where `stats` is None.

    A tensor is quantized by the layer that produces it, with that layer's settings; what arrives in float is quantized
    by the layer that uses it. An input override gives what arrives quantized a second grid, for that layer alone.
    `folded` maps batch-norms to the layers they were folded into: statistics of the unfolded model are understood.

    Raises StatsError where the statistics lack a layer or hold a range that cannot be used, ConfigError where
    settings contradict the graph.
    """
    planner = _Planner(graph, settings, stats, {layer: norm for norm, layer in (folded or {}).items()})
    plans = {name_of(node): planner.plan(node, module) for node, module in layers(graph)}
    if planner.problems:
        raise ConfigError(planner.problems)
    return with_notes(graph, Plan(_share_concat_grids(graph, settings, plans), dynamic=stats is None))


def _share_concat_grids(
    graph: Graph, settings: Mapping[str, LayerSettings], plans: dict[str, LayerPlan]
) -> dict[str, LayerPlan]:
    """Gives a layer that only feeds a concatenation the grid of that concatenation.

    Its codes are then copied instead of being rounded a second time to the same grid, which costs accuracy and time.
    Layers whose bits, mode or clipping differ from the concatenation's keep their own.
    """
    for node, module in layers(graph):
        whole = plans[name_of(node)].output
        if not layer_kind(module).shares_grid or whole is None:
            continue
        for source in layer_inputs(node):
            producer = sole_producer(graph, source, node)
            part = plans[name_of(producer)].output if producer is not None else None
            if part is None or producer is None or KINDS[plans[name_of(producer)].kind].fixed_grid:
                continue
            if request_of(settings[name_of(producer)]) == request_of(settings[name_of(node)]):
                plans[name_of(producer)] = replace(plans[name_of(producer)], output=whole)
    return plans


@dataclass
class _Planner:
    graph: Graph
    settings: Mapping[str, LayerSettings]
    stats: ModelStats | None
    norm_of: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fused = fused_activations(self.graph)
        self.quantized: dict[fx.Node, bool] = {}
        self.weights: dict[fx.Node, WeightPlan | None] = {}

    def arrives_quantized(self, node: fx.Node) -> bool:
        return self.quantized.get(source_of(self.graph, node), False)

    def plan(self, node: fx.Node, module: nn.Module) -> LayerPlan:
        """The plan of one layer; notes whether its output is quantized."""
        kind, settings = layer_kind(module), self.settings[name_of(node)]
        if settings.make_identity and node not in self.fused.values():
            self._problem(node, "make_identity", "is only known for a ReLU that its producer computes; remove it")
        if kind.keeps_grid:
            (source,) = layer_inputs(node)
            self.quantized[node] = self.arrives_quantized(source)
            return LayerPlan(kind.name, (None,))
        plan = self._plan_float(node, kind, settings) or (
            self._plan_dynamic(node, kind, settings) if self.stats is None else self._plan_static(node, kind, settings)
        )
        self.quantized[node] = plan.output is not None
        return plan

    def _problem(self, node: fx.Node, setting: str, sentence: str) -> None:
        where = self.settings[name_of(node)].origin_of(setting)
        self.problems.append(f"{where}: {setting} of {name_of(node)!r} {sentence}")

    def _weight(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> WeightPlan | None:
        if not kind.weighted or not settings.bits_weights or settings.fake:
            return None
        if node not in self.weights:
            self.weights[node] = self._new_weight(node, kind, settings)
        return self.weights[node]

    def _new_weight(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> WeightPlan:
        module = self.graph.get_submodule(str(node.target))
        if isinstance(module, ChannelAffine):  # one weight a channel: unless rounded, the scale makes it exact
            return WeightPlan(QuantSpec.of_mode("sym_restr", settings.bits_weights, 0, settings.pow2))
        spec = settings.spec_weights
        plan = WeightPlan(spec if kind.affine else replace(spec, axis=None))
        assert isinstance(module.weight, Tensor)
        weight = swap_channels(module, module.weight.detach())
        return plan_weight(plan, weight, settings.clip_wts, settings.clip_parameters)

    def _plan_float(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> LayerPlan | None:
        """The plan of a layer that computes in float whatever the statistics."""
        inputs = (None,) * len(layer_inputs(node))
        if settings.fpq is not None:
            note = f"runs in float{settings.fpq} ({settings.origin_of('fpq')})"
            return LayerPlan(kind.name, inputs, float_bits=settings.fpq, note=note)
        weight = self._weight(node, kind, settings)
        if not kind.accumulates and kind.weighted:
            return LayerPlan(kind.name, inputs, weight, note="" if weight else "bits_weights 0")
        if "shape" not in node.meta:
            return LayerPlan(kind.name, inputs, note="its output is not one tensor")
        if not _is_float(node):
            return LayerPlan(kind.name, inputs, weight, note=f"its output is {node.meta['dtype']}")
        if not settings.bits_activations:
            note = f"activations: bits 0 ({settings.origin_of('bits_activations')})"
            return LayerPlan(kind.name, inputs, weight, note=note)
        for reader in filter(lambda reader: self._needs_no_zero(reader, node), readers_of(self.graph, node)):
            note = f"not to be rounded to 0, where {name_of(reader)!r} has no value"
            return LayerPlan(kind.name, inputs, weight, note=note)
        return None

    def _needs_no_zero(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether a layer has no value where the output of `node` is 0."""
        index = self._input_without_zero(reader)
        return index is not None and producer_of(self.graph, layer_inputs(reader)[index]) is node

    def _input_without_zero(self, node: fx.Node) -> int | None:
        module = self.graph.get_submodule(str(node.target)) if is_layer(self.graph, node) else None
        index = _NO_ZERO.get(module.function) if isinstance(module, Function) else None
        slot = module.args[index] if isinstance(module, Function) and index is not None else None
        return int(slot) if isinstance(slot, Function.Slot) and slot >= 0 else None

    def _common(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> dict[str, Any]:
        common: dict[str, Any] = {"weight": self._weight(node, kind, settings)}
        if kind.accumulates:  # others have no accumulator: their plan does not claim one
            common |= {
                "bits_bias": settings.bits_bias,
                "bits_accum": settings.bits_accum,
                "scale_approx_bits": settings.scale_approx_mult_bits,
            }
        return common

    def _plan_dynamic(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> LayerPlan:
        sources = layer_inputs(node)
        if not kind.accumulates or (kind.weighted and not self._weight(node, kind, settings)):
            return LayerPlan(kind.name, (None,) * len(sources), note=NOT_DYNAMIC)
        inputs = tuple(dynamic_plan(settings.of_input(index)) for index in range(len(sources)))
        return LayerPlan(kind.name, inputs, **self._common(node, kind, settings))

    def _plan_static(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> LayerPlan:
        inputs = tuple(self._plan_input(node, kind, i, source) for i, source in enumerate(layer_inputs(node)))
        return LayerPlan(
            kind.name, inputs, output=self._plan_output(node, kind, settings), **self._common(node, kind, settings)
        )

    def _plan_input(self, node: fx.Node, kind: LayerKind, index: int, source: fx.Node) -> TensorPlan | None:
        if not _is_float(source) or index == self._input_without_zero(node):
            return None
        settings = self.settings[name_of(node)]
        overridden = index in settings.input_overrides
        mine = settings.of_input(index)
        if self.arrives_quantized(source):
            producer = name_of(producer_of(self.graph, source))
            if not overridden or request_of(mine) == request_of(self.settings[producer]):
                return None
            if not mine.bits_activations:
                self._problem(
                    node,
                    "input_overrides",
                    f"gives input {index} no bits, but {producer!r} quantizes it; override that layer",
                )
                return None
        if not kind.integer_bits and not settings.quantize_inputs:
            return None
        if not settings.inputs_quant_auto_fallback and not overridden:
            self._problem(
                node,
                "inputs_quant_auto_fallback",
                f"is false, but input {index} arrives in float; give input_overrides for it",
            )
            return None
        if not mine.bits_activations:
            return None
        origin = source_of(self.graph, source)
        if is_constant(origin):
            return constant_plan(attribute(self.graph, origin).detach(), mine)
        stats = self._input_stats(node, index)
        return self._tensor_plan(node, f"input {index} of", stats, mine, self._half_range(node, settings))

    def _plan_output(self, node: fx.Node, kind: LayerKind, settings: LayerSettings) -> TensorPlan:
        stats = self._layer_stats(node).output
        if kind.fixed_grid:
            axis = self.graph.get_submodule(str(node.target)).dim
            assert isinstance(axis, int)
            return softmax_plan(stats.max, node.meta["shape"][axis], settings)
        norm = self.norm_of.get(name_of(node))
        assert self.stats is not None
        if norm is not None and norm in self.stats.layers:
            stats = self.stats.layers[norm].output
        activation = self.fused.get(node)
        if settings.clip_acts == "n_std" and activation is not None and not kind.weighted:
            # Inferred from the ancestor's results, not from its code: only after weighted layers is the ReLU part of
            # the layer, after others its own mean and std count.
            stats = self._layer_stats(activation).output
        seen = self._seen_by_successor(node, stats)
        return self._tensor_plan(node, "the output of", seen, settings, self._half_range(node, settings))

    def _half_range(self, node: fx.Node, settings: LayerSettings) -> bool:
        """Whether gauss and laplace count on a ReLU: for the inputs too, as the ancestor does."""
        return settings.clip_half_range or node in self.fused

    def _seen_by_successor(self, node: fx.Node, stats: TensorStats) -> TensorStats:
        """The part of the range that the one layer after this one does not flatten."""
        users = tensor_users(node)
        if len(users) != 1 or not is_layer(self.graph, users[0]):
            return stats
        module = self.graph.get_submodule(str(users[0].target))
        if isinstance(module, nn.ReLU6):
            return clipped(stats, 0.0, 6.0)
        if isinstance(module, nn.ReLU):
            return clipped(stats, 0.0, max(stats.max, 0.0))
        limit = next((limit for kind, limit in _SATURATING if isinstance(module, kind)), None)
        return stats if limit is None else clipped(stats, -limit, limit)

    def _layer_stats(self, node: fx.Node) -> LayerStats:
        assert self.stats is not None
        found = self.stats.layers.get(name_of(node))
        if found is None:
            raise StatsError(
                f"the statistics lack layer {name_of(node)!r}; collect them again for this model with --qe-calibration,"
                " or leave the layer in float with --qe-no-quant-layers"
            )
        return found

    def _input_stats(self, node: fx.Node, index: int) -> TensorStats:
        inputs = self._layer_stats(node).inputs
        if index >= len(inputs):
            raise StatsError(
                f"the statistics lack input {index} of layer {name_of(node)!r}; collect them again for this model"
            )
        return inputs[index]

    def _tensor_plan(
        self, node: fx.Node, what: str, stats: TensorStats, settings: LayerSettings, half_range: bool
    ) -> TensorPlan:
        try:
            return plan_tensor(stats, settings, half_range)
        except StatsError as error:
            raise StatsError(f"{what} layer {name_of(node)!r}: {error}") from error


def _is_float(node: fx.Node) -> bool:
    """Whether a node holds real numbers: masks and indices have no grid."""
    return bool(node.meta.get("dtype", torch.float32) == torch.float32)
