"""The fake lowering: the float graph, with rounding wherever the plan quantizes; differentiable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph import Graph, activation_bounds, fused_activations
from qlib.graph.ir import is_layer, layer_inputs, name_of
from qlib.graph.walk import keeps_grid
from qlib.graph.weights import swap_channels
from qlib.lower.base import ActivationGrid
from qlib.lower.chunks import chunks, dense, laid_out_as
from qlib.quant.affine import QParams
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan

__all__ = ["FakeLayer", "FakeQuantize", "FakeWeight", "fake_quantize", "lower_fake"]


class _RoundToGrid(torch.autograd.Function):
    """`fake_quantize` for a scale of each channel, or with a drop mask: of weights, which are small."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, dropped: Tensor | None
    ) -> Tensor:
        scaled = x / scale
        codes = scaled.round().clamp_(low, high)  # type: ignore[arg-type]
        ctx.save_for_backward(scaled, codes, scale, dropped)
        y = codes * scale
        return y if dropped is None else torch.where(dropped, x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled, codes, scale, dropped = ctx.saved_tensors
        error = codes - scaled
        beyond = error.abs() > 0.5
        if dropped is not None:
            beyond &= ~dropped
        of_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(beyond, codes, error)
            slope = slope if dropped is None else slope.masked_fill_(dropped, 0.0)
            of_scale = slope.mul_(grad).sum_to_size(scale.shape)
        return grad.masked_fill(beyond, 0.0), of_scale, None, None, None


class _RoundTensor(torch.autograd.Function):
    """`fake_quantize` for one scale: of activations, which are most of what a fake model does beside convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        x, ctx.shape = dense(x), scale.shape
        scale = scale.reshape(())  # its axes would be those of the pieces
        ctx.save_for_backward(x, scale)
        ctx.bounds = float(low), float(high)
        y = torch.empty_like(x)
        for part, out in chunks(x, y):
            torch.div(part, scale, out=out).round_().clamp_(*ctx.bounds).mul_(scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        grad, of_x = laid_out_as(x, grads[0]), torch.empty_like(x)
        needs_scale, *needs_bounds = ctx.needs_input_grad[1:]
        of_scale, of_low, of_high = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(3))
        for part, up, out in chunks(x, grad, of_x):
            scaled = part / scale
            codes = scaled.round().clamp_(low, high)
            error = codes - scaled
            torch.mul(up, error.abs().le_(0.5), out=out)
            if needs_scale or any(needs_bounds):
                cut = up - out
                of_scale += torch.dot(error, out) + torch.dot(codes, cut)
            if any(needs_bounds):
                of_low += torch.dot(cut, torch.gt(error, 0, out=torch.empty_like(error)))
                of_high += torch.dot(cut, torch.lt(error, 0, out=torch.empty_like(error)))
        of_bounds = (
            total * scale if needed else None for total, needed in zip((of_low, of_high), needs_bounds, strict=True)
        )
        return of_x, of_scale.view(ctx.shape) if needs_scale else None, *of_bounds


def fake_quantize(
    x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, dropped: Tensor | None = None
) -> Tensor:
    """``clamp(round(x / s), low, high) * s`` with bounds of the centered codes, differentiable in x, s and the bounds.

    The gradient of x passes straight through the rounding and is 0 beyond the bounds; that of s is
    ``round(x / s) - x / s`` inside, the bound beyond; that of a bound is s beyond it.
    Where the mask `dropped` is set, x stays as it is.

    References: Esser et al., "Learned step size quantization", 2020, section 2.1.

    >>> x, s = torch.tensor([0.35, 9.0], requires_grad=True), torch.tensor(0.25, requires_grad=True)
    >>> y = fake_quantize(x, s, -8, 7)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist(), round(s.grad.item(), 4)
    ([0.25, 1.75], [1.0, 0.0], 6.6)
    """
    one = scale.numel() == 1 and not any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in (low, high))
    y: Tensor = (
        _RoundTensor.apply(x, scale, low, high)
        if one and dropped is None
        else _RoundToGrid.apply(x, scale, low, high, dropped)
    )
    return y


class FakeQuantize(nn.Module):
    """Rounds to an activation grid, but for the elements in the mask that `drop`, if there is one, makes (QDrop)."""

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.low, self.high = grid.low, grid.high
        self.drop: Callable[[Tensor], Tensor] | None = None
        self.spec, self.zero_point = grid.params.spec, grid.params.zero_point
        self.scale = nn.Parameter(grid.scale.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dropped = None if self.drop is None else self.drop(x)
        return fake_quantize(x, self.scale, self.low, self.high, dropped)

    @property
    def params(self) -> QParams:
        """The grid, with the scale that was learned."""
        return QParams(self.scale.detach(), self.zero_point, self.spec)


class FakeWeight(nn.Module):
    """Rounds a layer's weight to the grid that the plan gives it; the grid is fixed when this is made."""

    def __init__(self, module: nn.Module, plan: WeightPlan) -> None:
        super().__init__()
        weight = module.weight
        assert isinstance(weight, Tensor)
        swapped = swap_channels(module, weight.detach())
        params = plan.qparams(swapped)
        shape = [-1 if axis == params.spec.axis else 1 for axis in range(swapped.ndim)]
        self.layer = [module]  # in a list: the layer is no part of this module
        self.params = params
        self.scale = nn.Parameter(params.scale.view(shape), requires_grad=False)
        self.register_buffer("low", params.low.view(shape).float())
        self.register_buffer("high", params.high.view(shape).float())

    low: Tensor
    high: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, laid out as the layer's own."""
        return self.swap(fake_quantize(self.swap(weight), self.scale, self.low, self.high))

    def swap(self, weight: Tensor) -> Tensor:
        """From the layer's layout to ``[out, in / groups, ...]``, or back."""
        return swap_channels(self.layer[0], weight)


class FakeLayer(nn.Module):
    """A float layer whose inputs, weight, bias and output are rounded to their grids, where they have one.

    `source` is the grid of what arrives, None where that is float: a bias has the grid of the accumulator,
    ``s_x * s_w``, which is coarse where both have few bits.
    """

    def __init__(
        self, module: nn.Module, plan: LayerPlan, source: FakeQuantize | None, bounds: tuple[float, float] | None
    ) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ModuleList([nn.Identity() if t is None else FakeQuantize(_grid_of(t)) for t in plan.inputs])
        self.weight: nn.Module | None = None if plan.weight is None else FakeWeight(module, plan.weight)
        self.output = None if plan.output is None else FakeQuantize(_grid_of(plan.output, bounds))
        own = self.inputs[0] if len(self.inputs) else None
        self.source = [own if isinstance(own, FakeQuantize) else source]  # in a list: it is part of another layer

    def forward(self, *args: Any) -> Any:
        y = self.before_rounding(*args)
        return y if self.output is None else self.output(y)

    def before_rounding(self, *args: Any) -> Any:
        """The output in float, before it is put on its grid (and before the activation that its bounds stand for)."""
        grids = iter(self.inputs)
        values = [next(grids, nn.Identity())(arg) if isinstance(arg, Tensor) else arg for arg in args]
        if self.weight is None:
            return self.module(*values)
        parameters = {"weight": self.weight(self.module.weight)} | self._rounded_bias()
        return torch.func.functional_call(self.module, parameters, tuple(values))

    def _rounded_bias(self) -> dict[str, Tensor]:
        (source,), bias = self.source, getattr(self.module, "bias", None)
        scale = getattr(self.weight, "scale", None)
        if source is None or not isinstance(bias, Tensor) or not isinstance(scale, Tensor):
            return {}
        product = (source.scale * scale).detach().flatten()
        return {"bias": bias + (torch.round(bias / product) * product - bias).detach()}


def _grid_of(plan: TensorPlan, bounds: tuple[float, float] | None = None) -> ActivationGrid:
    return ActivationGrid.of(plan.qparams(), bounds)


def lower_fake(graph: Graph, plan: Plan) -> fx.GraphModule:
    """A copy of `graph` whose layers round as `plan`, which is not dynamic, says; nodes keep their names.

    Activations that travel are real values on their grid. Up to the rounding of float32 it computes what the exact
    lowering computes; what that rounds more than once is rounded once here. A code in ten thousand differs, and what
    follows from it: at few bits, predictions of images on the edge.
    """
    assert not plan.dynamic
    lowered: fx.GraphModule = copy.deepcopy(graph)
    fused = fused_activations(lowered)
    grids: dict[fx.Node, FakeQuantize | None] = {}
    for node in lowered.graph.nodes:
        sources = layer_inputs(node) if node.op != "placeholder" else []
        source = grids.get(sources[0]) if sources else None
        if not is_layer(lowered, node):
            grids[node] = source if keeps_grid(lowered, node) else None
            continue
        module, layer = lowered.get_submodule(str(node.target)), plan.layers[name_of(node)]
        if layer.weight is None and layer.output is None and not any(layer.inputs):
            grids[node] = source if keeps_grid(lowered, node) else None
            continue
        activation = fused.get(node) if layer.output is not None else None
        bounds = None if activation is None else activation_bounds(lowered, activation)
        fake = FakeLayer(module, layer, source, bounds)
        grids[node] = fake.output
        node.target = f"fake.{node.name}"
        lowered.add_submodule(node.target, fake)
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    device = next((value.device for value in graph.state_dict().values()), torch.device("cpu"))
    return lowered.to(device).eval()
