"""The quantizers of one layer, made by the method that it is assigned to."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from torch import Tensor, fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph
from qlib.graph.ir import is_constant, layer_inputs, name_of, source_of
from qlib.graph.kinds import KINDS
from qlib.graph.walk import producer_of
from qlib.graph.weights import swap_channels
from qlib.lower.trainable import ActivationQuantizer, FixedActivation, TrainableLayer, WeightQuantizer, nonzero
from qlib.ptq.weight_ranges import plan_weight
from qlib.qat.assignment import ScheduledQuantizer
from qlib.qat.base import ActivationSite, WeightSite
from qlib.qat.quantized_tensors import before_relu, ends_in_relu
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, TensorPlan, WeightPlan

__all__ = ["leave_in_float", "quantize_layer"]


def leave_in_float(layer: TrainableLayer) -> None:
    """Takes its quantizers from a layer."""
    layer.weight, layer.output, layer.gradient = None, None, None
    for index in range(len(layer.inputs)):
        layer.inputs[index] = nn.Identity()


def quantize_layer(
    graph: Graph,
    node: fx.Node,
    layer: TrainableLayer,
    scheduled: ScheduledQuantizer,
    plan: LayerPlan,
    shared: MutableMapping[int, WeightQuantizer],
    *,
    anew: bool,
) -> None:
    """Gives a layer its quantizers: all of them `anew`, or only those of inputs that its plan has and it has not.

    `shared` holds the weight quantizers by module: layers that share a weight share its quantizer.
    """
    if anew:
        weight = _weight_quantizer(name_of(node), layer, scheduled, plan)
        layer.weight = None if weight is None else shared.setdefault(id(layer.module), weight)
        layer.output = _output_quantizer(graph, node, layer, scheduled, plan)
        layer.gradient = scheduled.method.gradient() if plan.weight is not None else None
    for index, planned in enumerate(plan.inputs):
        if planned is None:
            layer.inputs[index] = nn.Identity()
        elif anew or isinstance(layer.inputs[index], nn.Identity):
            layer.inputs[index] = _input_quantizer(graph, node, scheduled, index, planned)


def _weight_quantizer(
    name: str, layer: TrainableLayer, scheduled: ScheduledQuantizer, plan: LayerPlan
) -> WeightQuantizer | None:
    """None too for a batch-norm that stands alone: one weight a channel is exact on any grid."""
    weight = getattr(layer.module, "weight", None)
    if plan.weight is None or not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    settings, gain = scheduled.settings[name], layer.gain()
    weight = swap_channels(layer.module, weight.detach())
    stochastic = scheduled.common.rounding == "stochastic"
    site = WeightSite(weight, settings.bits_weights, _start(settings, weight), stochastic)
    quantizer = scheduled.method.weight(site)
    if quantizer.folds and gain is not None:
        folded = weight * nonzero(gain).view(-1, *[1] * (weight.ndim - 1))
        quantizer = scheduled.method.weight(replace(site, weight=folded, start=_start(settings, folded)))
    return quantizer


def _start(settings: LayerSettings, weight: Tensor) -> QParams:
    """The grid that the weight starts from, of 2 bits or more."""
    plan = WeightPlan(replace(settings, bits_weights=max(settings.bits_weights, 2)).spec_weights)
    return plan_weight(plan, weight, settings.clip_wts, settings.clip_parameters).qparams(weight)


def _output_quantizer(
    graph: Graph, node: fx.Node, layer: TrainableLayer, scheduled: ScheduledQuantizer, plan: LayerPlan
) -> ActivationQuantizer | None:
    if plan.output is None:
        return None
    start, bits = plan.output.qparams(), scheduled.settings[name_of(node)].bits_activations
    if KINDS[plan.kind].fixed_grid:
        return FixedActivation(start)
    relu = layer.activation is not None or ends_in_relu(graph, node)
    return scheduled.method.activation(ActivationSite(bits, start, relu))


def _input_quantizer(
    graph: Graph, node: fx.Node, scheduled: ScheduledQuantizer, index: int, planned: TensorPlan
) -> ActivationQuantizer:
    """The quantizer of an input: of the images, a constant, or what another layer left in float or on more bits."""
    source, start = source_of(graph, layer_inputs(node)[index]), planned.qparams()
    if is_constant(source):
        return FixedActivation(start)
    bits = scheduled.settings[name_of(node)].of_input(index).bits_activations
    return scheduled.method.activation(
        ActivationSite(bits, start, _gives_relu(graph, source), source.op == "placeholder")
    )


def _gives_relu(graph: Graph, source: fx.Node) -> bool:
    """Whether `source` holds the output of a ReLU, perhaps pooled."""
    node = producer_of(graph, source, before_relu)
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(getattr(module, "activation", module), (nn.ReLU, nn.ReLU6))
