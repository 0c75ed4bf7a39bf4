"""The dynamic lowering: activations are quantized with the range of each image, between float layers.

As deployed dynamic kernels do (DynamicQuantizeLinear, ConvInteger), inputs of weighted layers and matrix products
become integers and the accumulator leaves as float. The range is that of one image, so a result does not depend on
how images are batched.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from qlib.clip import CLIP_METHODS, ClipContext
from qlib.errors import StatsError
from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.graph.kinds import kind_of, layer_kind
from qlib.graph.ops import MatMul
from qlib.lower.base import LOWERINGS, ActivationGrid, LayerContext
from qlib.lower.ops.weighted import ExactWeighted
from qlib.quant.affine import QParams, qparams_from_range
from qlib.quant.arithmetic import dynamic_float_reason
from qlib.quant.clip_names import ClipParameters
from qlib.quant.plan import LayerPlan, Plan, TensorPlan
from qlib.stats.tensor_stats import TensorStats

__all__ = ["DynamicWeighted", "dynamic_name", "lower_dynamic", "quantize_each"]


def lower_dynamic(graph: Graph, plan: Plan) -> fx.GraphModule:
    """A copy of `graph` whose weighted layers and matrix products compute in integers, as `plan` says."""
    assert plan.dynamic
    lowered = copy.deepcopy(graph)
    calls = [node for node, _ in layers(lowered)]
    for node in calls:
        module = lowered.get_submodule(str(node.target))
        layer = plan.layers[name_of(node)]
        target = dynamic_name(node)
        if layer_kind(module).accumulates and not dynamic_float_reason(module, layer):
            replacement = _build(name_of(node), module, layer)
        elif layer.weight is not None or layer.float_bits is not None:
            replacement, _ = LOWERINGS[kind_of(module)](LayerContext(module, layer, (None,) * len(layer.inputs), None))
        else:
            continue
        lowered.add_submodule(target, replacement)
        node.target = target
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered.eval()


def dynamic_name(node: fx.Node) -> str:
    """The name that the lowering gives to the layer at `node`, which may share its module with others."""
    return f"layers.{node.name}"


def _build(name: str, module: nn.Module, layer: LayerPlan) -> nn.Module:
    return DynamicMatMul(name, module, layer) if isinstance(module, MatMul) else DynamicWeighted(name, module, layer)


def quantize_each(name: str, x: Tensor, plan: TensorPlan) -> tuple[Tensor, Tensor]:
    """Centered codes of ``x [N, ...]`` on a grid of its own for each sample, and their scales ``[N]``.

    Raises StatsError, naming the layer, for NaN or infinity.
    """
    flat = x.flatten(1)
    mean = flat.mean(1, keepdim=True)
    columns = [flat.amin(1), flat.amax(1), mean[:, 0]]
    if CLIP_METHODS.facts(plan.clip).get("spread"):
        columns += [flat.std(1, correction=0), (flat - mean).abs().mean(1)]
    context = ClipContext(plan.spec, clip_parameters=ClipParameters(dict(plan.clip_parameters)))
    ranges = []
    for low, high, average, *spread in torch.stack(columns, 1).tolist():
        std, b = spread or (None, None)
        stats = TensorStats(flat.shape[1], 1, low, high, low, high, average, std, b)
        ranges.append(CLIP_METHODS[plan.clip](stats, context))
    try:
        lows, highs = torch.tensor(ranges, dtype=torch.float64).T
        params = qparams_from_range(lows, highs, plan.spec)
    except ValueError as error:
        raise StatsError(f"an input of {name!r} cannot be quantized: {error}; check the weights and images") from error
    scale, low, high = (t.to(x.device).view(-1, *[1] * (x.ndim - 1)) for t in (params.scale, params.low, params.high))
    return torch.clamp(torch.round(x / scale), low, high), scale


def _any_grid(plan: TensorPlan) -> ActivationGrid:
    """The loosest bounds that centered codes can have, whatever the range."""
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    reach = plan.spec.qmax - plan.spec.qmin
    return ActivationGrid(QParams(one, zero, plan.spec), -reach, reach)


class DynamicWeighted(ExactWeighted):
    """Convolution or linear: integer accumulator, integer bias at each sample's ``s_x * s_w``, float output."""

    BIAS = "float_bias"

    def __init__(self, name: str, module: nn.Module, plan: LayerPlan) -> None:
        assert plan.inputs[0] is not None
        super().__init__(LayerContext(module, plan, (_any_grid(plan.inputs[0]),), None))
        self.name, self.input_plan = name, plan.inputs[0]
        self.float_bias = nn.Parameter(module.bias.detach().clone()) if isinstance(module.bias, Tensor) else None

    def _bias_codes(self, module: nn.Module) -> Tensor | None:
        return None  # its scale changes with each sample: see forward

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_each(self.name, x, self.input_plan)
        acc = self.accumulate(codes)
        factor = scale * self.factor
        if self.float_bias is not None:
            limit = 2 ** (self.plan.bits_bias - 1)
            bias = self.float_bias.view(-1, *[1] * self.ndim)
            acc = acc + torch.round(bias / factor).clamp_(-limit, limit - 1)
        if self.saturation is not None:
            acc = acc.clamp_(-self.saturation, self.saturation - 1)
        return acc * factor


class DynamicMatMul(nn.Module):
    """Matrix product of two activations: integer accumulator, float output."""

    def __init__(self, name: str, module: MatMul, plan: LayerPlan) -> None:
        super().__init__()
        assert plan.inputs[0] is not None
        assert plan.inputs[1] is not None
        self.name, self.module, self.plans = name, module, (plan.inputs[0], plan.inputs[1])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a_codes, a_scale = quantize_each(self.name, a, self.plans[0])
        matrix = b.ndim < 3  # its rows are summed over: one scale for all of it
        b_codes, b_scale = quantize_each(self.name, b[None] if matrix else b, self.plans[1])
        b_codes, b_scale = (b_codes[0], b_scale[0]) if matrix else (b_codes, b_scale)
        b_codes = b_codes.transpose(-2, -1) if self.module.transpose else b_codes
        acc = torch.matmul(a_codes.double(), b_codes.double()).float()
        return acc * (a_scale * self.module.alpha * b_scale)
