"""Convolution, transposed convolution and linear: integer accumulators, one requantization.

``acc = sum((x_q - z_x) * (w_q - z_w)) + b_q``; output ``clamp(rint(float32(acc) * ((s_x * s_w) / s_y)) + z_y)``.
"""

from __future__ import annotations

import copy
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from qlib.graph.weights import swap_channels
from qlib.lower.accumulator import accumulator_bounds, rounded_sum, split_points
from qlib.lower.apply_weight import ApplyWeight, padding_of
from qlib.lower.base import (
    EXACT_LIMIT,
    LOWERINGS,
    ActivationGrid,
    ActivationGrids,
    ExactLayer,
    Grid,
    LayerContext,
    Lowered,
)
from qlib.lower.ops.float_op import FloatOp
from qlib.lower.weighted_qdq import Stored, weighted_qdq
from qlib.quant.affine import (
    QParams,
    approximate_factor,
    dequantize,
    quantize,
    requant_factor,
)
from qlib.quant.spec import QuantSpec

__all__ = ["ExactWeighted", "FloatWeighted"]


def _smallest_dtype(spec: QuantSpec) -> torch.dtype:
    # Unsigned ones as uint8 even where int8 would do: kernels of signed weights may saturate (see lower.saturation).
    for dtype in (torch.int8 if spec.signed else torch.uint8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= spec.qmin and spec.qmax <= info.max:
            return dtype
    return torch.int32


_MAX_PARTS = 4
"""Of more, one float64 product is cheaper than many float32 ones."""


class _QuantizedWeight(ExactLayer):
    """A layer's integer weight ``[out, in / groups, ...]``, with what is derived from it after each load."""

    BIAS: ClassVar[str]
    """The name of the bias in the layer's state."""

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        plan, weight = context.plan.weight, context.module.weight
        assert plan is not None
        assert isinstance(weight, Tensor)
        weight = swap_channels(context.module, weight.detach())
        self.spec = plan.spec
        self.apply_weight, self.pad = ApplyWeight.of(context.module), padding_of(context.module)
        params = plan.qparams(weight)
        self.register_buffer("weight_codes", quantize(weight, params).to(_smallest_dtype(self.spec)))
        self.register_buffer("weight_scale", params.scale)
        self.register_buffer("weight_zero_point", params.zero_point)
        self.register_load_state_dict_post_hook(lambda module, keys: module.prepare())  # type: ignore[no-untyped-call]

    @property
    def weight_params(self) -> QParams:
        return QParams(self.weight_scale, self.weight_zero_point, self.spec)

    def centered_weight(self) -> Tensor:
        """``w_q - z_w`` in float32."""
        unit = QParams(torch.ones_like(self.weight_scale), self.weight_zero_point, self.spec)
        return dequantize(self.weight_codes.float(), unit)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that may stand in each tensor of the state that the plan bounds."""
        codes = (self.spec.qmin, self.spec.qmax)
        scales = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
        zero_points = (0, 0) if self.spec.symmetric else codes
        return {"weight_codes": codes, "weight_scale": scales, "weight_zero_point": zero_points}

    def prepare(self) -> None:
        """Derives what `forward` uses from the integers."""
        raise NotImplementedError

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The float layer between dequantize and quantize; padding that copies values is done on the codes."""
        codes = self.weight_codes
        if codes.dtype in (torch.int8, torch.uint8):
            weight = Stored(codes, self.weight_scale, self.weight_zero_point.to(codes.dtype))
        else:  # ONNX Runtime takes any codes for those of its integer kernels, and fails on wider ones
            weight = Stored(dequantize(codes.float(), self.weight_params))
        return weighted_qdq(self.apply_weight, self.pad, weight, self._stored_bias(inputs[0]), inputs, output)

    def _stored_bias(self, grid: ActivationGrid | None) -> Stored | None:
        """The bias as the file holds it."""
        bias: Tensor | None = getattr(getattr(self, "module", None), "bias", None)
        return None if bias is None else Stored(bias)


class FloatWeighted(_QuantizedWeight):
    """A layer with an integer weight, and float before or after it: computes with the dequantized weight."""

    BIAS = "module.bias"
    weight: Tensor
    scale: Tensor | None

    def __init__(self, context: LayerContext) -> None:
        super().__init__(context)
        self.module = copy.deepcopy(context.module)
        self.module.weight = None  # type: ignore[assignment]
        self.register_buffer("weight", None, persistent=False)
        grid = context.inputs[0]
        self.register_buffer("scale", grid.scale if grid is not None else None, persistent=False)
        self.grid = Grid(context.output) if context.output is not None else None
        self.prepare()

    def prepare(self) -> None:
        self.weight = swap_channels(self.module, dequantize(self.weight_codes.float(), self.weight_params))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x * self.scale
        y: Tensor = torch.func.functional_call(self.module, {"weight": self.weight}, (x,))
        return y if self.grid is None else self.grid.quantize(y)


class _PlainWeighted(FloatOp):
    """A layer whose weight stays in float."""

    def qdq(self, inputs: ActivationGrids, output: ActivationGrid | None) -> nn.Module:
        """The same."""
        if inputs[0] is None or self.dtype != torch.float32:
            return super().qdq(inputs, output)
        bias = cast("Tensor | None", self.module.bias)
        weight = Stored(swap_channels(self.module, cast(Tensor, self.module.weight)))
        apply_weight, pad = ApplyWeight.of(self.module), padding_of(self.module)
        stored = None if bias is None else Stored(bias)
        return weighted_qdq(apply_weight, pad, weight, stored, inputs, output)


class ExactWeighted(_QuantizedWeight):
    """Integer convolution or linear on centered codes, computed exactly by float32 arithmetic.

    float32 is exact while every accumulator stays below 2^24. The bound is computed when the layer is prepared; above
    it the input channels are split into parts that stay below (one rounding, when they are added, is the rounding of
    ``float32(acc)``), and where that is impossible the layer computes in float64.
    """

    BIAS = "bias_codes"
    weights: Tensor
    bias: Tensor | None
    bias_codes: Tensor | None
    factor: Tensor

    def __init__(self, context: LayerContext) -> None:
        super().__init__(context)
        (grid,) = context.codes_in()
        self.source, self.plan, self.limit = grid, context.plan, context.accumulator_limit
        self.grid = Grid(context.output) if context.output is not None else None
        self.ndim = self.weight_codes.ndim - 2
        self.register_buffer("bias_codes", self._bias_codes(context.module))
        for name in ("weights", "bias", "factor"):
            self.register_buffer(name, None, persistent=False)
        self.prepare()

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Those of the weight, and those that the bits of the bias give."""
        limit = 2 ** (self.plan.bits_bias - 1)
        return {**super().bounds, "bias_codes": (-limit, limit - 1)}

    def _bias_codes(self, module: nn.Module) -> Tensor | None:
        bias: Tensor | None = getattr(module, "bias", None)
        if bias is None:
            return None
        limit = 2 ** (self.plan.bits_bias - 1)
        codes = torch.round(bias.detach() / (self.source.scale * self.weight_scale)).double()
        return codes.clamp(-limit, limit - 1).to(torch.int32)

    def prepare(self) -> None:
        scale = self.source.scale.to(self.weight_scale.device)
        factor = scale * self.weight_scale
        if self.grid is not None:
            factor = requant_factor(scale, self.weight_scale, self.grid.scale.to(scale.device))
            if self.plan.scale_approx_bits is not None:
                factor = approximate_factor(factor, self.plan.scale_approx_bits)
        self.factor = factor.view(-1, *[1] * self.ndim) if factor.ndim else factor
        weight = self.centered_weight()
        total = float(accumulator_bounds(weight, self.bias_codes, self.source, by_channel=False).max())
        self.saturation = self.limit if total >= self.limit else None
        cuts = () if total < EXACT_LIMIT else self._cuts(weight)
        self.cuts, self.in_double = cuts or (), cuts is None
        self.weights = weight.double() if self.in_double else weight
        if self.ndim == 2 and self.weights.ndim == 4:
            self.weights = self.weights.contiguous(memory_format=torch.channels_last)
        self.bias = None if self.bias_codes is None else self.bias_codes.to(self.weights.dtype)

    def _cuts(self, weight: Tensor) -> tuple[int, ...] | None:
        """Where to cut the input channels; None where float64 is needed, or cheaper."""
        if not self.apply_weight.splittable:
            return None
        cuts = split_points(accumulator_bounds(weight, self.bias_codes, self.source, by_channel=True))
        return None if cuts is None or len(cuts) >= _MAX_PARTS else tuple(cuts)

    def partial_sums(self, codes: Tensor) -> list[Tensor]:
        """Tensors whose sum is the accumulator, each of them exact; one in float64, or one or more in float32."""
        codes = codes if self.pad is None else self.pad(codes)
        if not self.cuts:
            codes = codes.double() if self.in_double else codes
            return [self.apply_weight(codes, self.weights, self.bias)]
        axis = 1 if self.ndim else codes.ndim - 1
        starts, ends = (0, *self.cuts), (*self.cuts, codes.shape[axis])
        return [
            self.apply_weight(
                codes.narrow(axis, start, end - start),
                self.weights.narrow(1, start, end - start),
                self.bias if start == 0 else None,
            )
            for start, end in zip(starts, ends, strict=True)
        ]

    def _stored_bias(self, grid: ActivationGrid | None) -> Stored | None:
        """int32 codes of scale ``s_x * s_w``."""
        if self.bias_codes is None:
            return None
        assert grid is not None
        zero_point = torch.zeros_like(self.weight_scale, dtype=torch.int32)
        return Stored(self.bias_codes, grid.scale * self.weight_scale, zero_point)

    def accumulate(self, codes: Tensor) -> Tensor:
        """``float32(acc)``, before requantization."""
        return rounded_sum(self.partial_sums(codes))

    def forward(self, codes: Tensor) -> Tensor:
        return self.requantize(self.accumulate(codes))

    def requantize(self, acc: Tensor) -> Tensor:
        """The codes of accumulators, which are overwritten."""
        if self.saturation is not None:
            acc = acc.clamp_(-self.saturation, self.saturation - 1)
        acc = acc.mul_(self.factor)
        return acc if self.grid is None else self.grid(acc)


@LOWERINGS.register("conv")
@LOWERINGS.register("conv_transpose")
@LOWERINGS.register("linear")
def lower_weighted(context: LayerContext) -> Lowered:
    """Exact where input and weight are integer; dequantized weight where only the weight is; float otherwise."""
    if context.plan.weight is None:
        return _PlainWeighted(context), context.output
    return (ExactWeighted(context) if context.integer else FloatWeighted(context)), context.output
