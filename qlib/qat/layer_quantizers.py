"""The quantizers of one layer, made by the method that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph
from qlib.graph.ir import layer_inputs, name_of, source_of
from qlib.graph.kinds import KINDS
from qlib.graph.walk import producer_of
from qlib.graph.weights import swap_channels
from qlib.lower.trainable import (
    ActivationQuantizer,
    FixedActivation,
    TrainableLayer,
    WeightQuantizer,
)
from qlib.ptq.weight_ranges import plan_weight
from qlib.qat.assignment import Claim
from qlib.qat.base import ActivationSite, WeightSite
from qlib.qat.quantized_tensors import before_relu, ends_in_relu
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, TensorPlan, WeightPlan

__all__ = ["LayerQuantizers"]


@dataclass(frozen=True, eq=False)
class LayerQuantizers:
    """Makes the quantizers of one layer."""

    claim: Claim
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
        site = WeightSite(weight, settings.bits_weights, start, stochastic)
        quantizer = self.claim.method.weight(site)
        if quantizer.folds and gain is not None:
            folded = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            quantizer = self.claim.method.weight(replace(site, weight=folded, start=self._start(folded)))
        return quantizer

    def _start(self, weight: Tensor) -> QParams:
        settings = replace(self.settings, bits_weights=max(self.settings.bits_weights, 2))
        plan = WeightPlan(settings.spec_weights)
        planned = plan_weight(plan, weight, settings.clip_wts, settings.clip_parameters)
        return planned.qparams(weight)

    def output(self) -> ActivationQuantizer | None:
        if self.plan.output is None:
            return None
        start = self.plan.output.qparams()
        if KINDS[self.plan.kind].fixed_grid:
            return FixedActivation(start)
        relu = self.layer.activation is not None or ends_in_relu(self.graph, self.node)
        return self.claim.method.activation(ActivationSite(self.settings.bits_activations, start, relu))

    def input(self, index: int, planned: TensorPlan) -> ActivationQuantizer:
        """The quantizer of an input: of the images, a constant, or what another layer left in float or on more bits."""
        source = source_of(self.graph, layer_inputs(self.node)[index])
        if source.op == "get_attr":
            return FixedActivation(planned.qparams())
        bits, start = self.settings.of_input(index).bits_activations, planned.qparams()
        return self.claim.method.activation(
            ActivationSite(bits, start, self._gives_relu(source), source.op == "placeholder")
        )

    def _gives_relu(self, source: fx.Node) -> bool:
        """Whether `source` holds the output of a ReLU, perhaps pooled."""
        node = producer_of(self.graph, source, before_relu)
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(getattr(module, "activation", module), (nn.ReLU, nn.ReLU6))

    def gradient(self) -> nn.Module | None:
        return self.claim.method.gradient() if self.plan.weight is not None else None
