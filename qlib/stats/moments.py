"""Mean, deviation and bounds of every tensor of a graph, from batch-norms alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph import Graph, NormStatistics, activation_bounds
from qlib.graph.ir import is_layer, name_of
from qlib.graph.kinds import ELEMENTWISE, layer_kind
from qlib.graph.ops import Add, Concat, Mul

__all__ = ["DEVIATIONS", "Moments", "clipped_normal", "propagate"]

DEVIATIONS = 6.0
"""A tensor is taken to reach this many standard deviations on either side of its mean."""

_POINTS = 33
"""At how many points of a normal distribution, and of an interval, a function of one value is looked at."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a tensor: mean and variance of each element, and the bounds it stays within.

    All have the tensor's shape, for the batch that the graph was captured with. NaN where nothing is known.
    """

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.variance, self.low, self.high

    @classmethod
    def constant(cls, value: Tensor) -> Moments:
        """Those of a tensor that is the same for all images."""
        value = value.detach().float().cpu()
        return cls(value, torch.zeros_like(value), value, value)

    @classmethod
    def normal(cls, mean: Tensor, variance: Tensor, low: Tensor | float, high: Tensor | float) -> Moments:
        """A normal distribution within `DEVIATIONS`, and within ``[low, high]``."""
        reach = DEVIATIONS * variance.sqrt()
        low, high = (torch.as_tensor(each, dtype=mean.dtype) for each in (low, high))
        return cls(mean, variance, torch.maximum(mean - reach, low), torch.minimum(mean + reach, high))


def propagate(
    graph: Graph, norms: Mapping[str, NormStatistics], image_range: tuple[Tensor, Tensor] | None
) -> dict[fx.Node, Moments]:
    """The moments of each tensor of a folded graph, on the CPU.

    A layer that `norms` knows is normal, whatever it reads. From there on, elements count as independent: through an
    addition means and variances add, through a weight ``E[y] = W E[x] + b`` and ``Var[y] = W^2 Var[x]``; a ReLU cuts
    the distribution, a pool moves it. Nothing is known of what a convolution of more than one pixel makes without a
    batch-norm, nor of anything that no batch-norm comes before. `image_range` holds the least and greatest value of
    each color, or None: then nothing is known of the image either.

    References: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, sec. 4.2.
    """
    propagation = _Propagation(graph, norms, image_range)
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        propagation.run(torch.zeros(image.meta["shape"]))
    return propagation.found


def clipped_normal(mean: Tensor, variance: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``clamp(x, low, high)`` for a normal x; `low` is finite.

    With ``a = (low - mean) / std``, ``c = (high - mean) / std``, density phi and distribution Phi of the standard
    normal: ``E = low Phi(a) + high (1 - Phi(c)) + mean (Phi(c) - Phi(a)) - std (phi(c) - phi(a))``.

    References: Nagel et al. 2019, appendix C.

    >>> mean, variance = clipped_normal(torch.tensor(0.0), torch.tensor(1.0), 0.0, math.inf)
    >>> round(mean.item(), 4), round(variance.item(), 4)  # 1 / sqrt(2 pi), 1 / 2 - 1 / (2 pi)
    (0.3989, 0.3408)
    """
    m, v = mean.double(), variance.double()
    std = v.sqrt().clamp(min=1e-30)
    a = (low - m) / std
    lower, density_a = torch.special.ndtr(a), _density(a)
    if math.isinf(high):
        upper, density_c, c_density = torch.ones_like(m), torch.zeros_like(m), torch.zeros_like(m)
        above = torch.zeros_like(m)
        top = 0.0
    else:
        c = (high - m) / std
        upper, density_c = torch.special.ndtr(c), _density(c)
        c_density, above, top = c * density_c, torch.special.ndtr(-c), high
    inside = upper - lower
    first = low * lower + top * above + m * inside - std * (density_c - density_a)
    # of the deviations from `mean`: E[(clamp(x) - m)^2]
    second = (low - m) ** 2 * lower + v * (inside - (c_density - a * density_a))
    second = second + ((top - m) ** 2 * above if top else 0.0)
    return first.to(mean.dtype), (second - (first - m) ** 2).clamp(min=0.0).to(mean.dtype)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.clamp(-1e4, 1e4).square() / 2) / math.sqrt(2 * math.pi)


class _Propagation(fx.Interpreter):
    """Runs the graph on `Moments`."""

    def __init__(
        self, graph: Graph, norms: Mapping[str, NormStatistics], image_range: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(graph)
        self.graph_module, self.norms, self.image_range = graph, norms, image_range
        self.found: dict[fx.Node, Moments] = {}
        self.grounded: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            value: Any = self._image(super().run_node(n))
        elif n.op == "get_attr" and n.meta["tensor"]:
            value = Moments.constant(super().run_node(n))
        elif n.op == "output":
            return None
        elif is_layer(self.graph_module, n):
            value = self._layer(n)
        else:
            value = self._move(n)
        if isinstance(value, Moments):
            self.found[n] = value
        if name_of(n) in self.norms or any(source in self.grounded for source in n.all_input_nodes):
            self.grounded.add(n)
        return value

    def _image(self, x: Tensor) -> Moments:
        if self.image_range is None:
            return Moments(*[torch.full_like(x, torch.nan)] * 4)
        low, high = (each.float().cpu().view(1, -1, *[1] * (x.ndim - 2)).expand(x.shape) for each in self.image_range)
        middle = torch.where((low < 0) & (high > 0), 0.0, (low + high) / 2)  # normalized images have mean 0
        return Moments(middle, (high - low).square() / 12, low, high)

    def _move(self, n: fx.Node) -> Any:
        """Moves the parts one by one; what is no tensor is computed once."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def run(part: int) -> Any:
            mine = fx.node.map_aggregate(
                (args, kwargs), lambda value: self._part(n, value, part) if isinstance(value, Moments) else value
            )
            return getattr(self, n.op)(n.target, *mine)

        if not n.meta["tensor"]:
            return run(0)
        return _joined([run(part) for part in range(4)])

    def _part(self, n: fx.Node, value: Moments, part: int) -> Tensor:
        one = value.parts[part]
        return torch.full_like(one, torch.nan) if is_layer(self.graph_module, n) else one

    def _layer(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        inputs = [arg for arg in args if isinstance(arg, Moments)]
        module = self.graph_module.get_submodule(str(n.target))
        if "shape" not in n.meta:
            return self._move(n)  # several tensors: only their number and shapes are known
        shape = n.meta["shape"]
        norm = self.norms.get(name_of(n))
        if norm is not None:
            axes = [1, -1, *[1] * (len(shape) - 2)]
            mean, std = (each.float().cpu().view(axes[: len(shape)]) for each in (norm.mean, norm.std))
            channels = Moments.normal(mean, std.square(), -math.inf, math.inf)
            known = Moments(*(part.expand(shape) for part in channels.parts))
            return self._bounded(n, module, known, inputs)
        return self._unnormed(n, module, inputs)

    def _bounded(self, n: fx.Node, module: nn.Module, known: Moments, inputs: list[Moments]) -> Moments:
        """What a batch-norm tells of an activation or a pool stays within what they can give."""
        kind = layer_kind(module)
        if not (kind.is_relu or kind.pools):
            return known
        own = self._unnormed(n, module, inputs)
        return Moments(known.mean, known.variance, torch.fmax(known.low, own.low), torch.fmin(known.high, own.high))

    def _unnormed(self, n: fx.Node, module: nn.Module, inputs: list[Moments]) -> Moments:
        kind = layer_kind(module)
        if kind.is_relu:
            low, high = activation_bounds(self.graph_module, n)
            return _compactly(lambda x: _cut(x, low, high), inputs[0])
        if kind.pools:
            return Moments(*(module(part) for part in inputs[0].parts))
        if isinstance(module, Concat):
            return Moments(*(module(*parts) for parts in zip(*(x.parts for x in inputs), strict=True)))
        if isinstance(module, Add):
            return _add(*map(_scaled, inputs, module.factors))
        if isinstance(module, Mul):
            return _scaled(_multiply(*inputs), module.alpha)
        if isinstance(module, ELEMENTWISE):
            return _compactly(lambda x: _function(module, x), inputs[0])
        grounded = any(source in self.grounded for source in n.all_input_nodes)
        if grounded and _is_matrix(module):
            return _weighted(module, inputs[0])
        return Moments(*[torch.full(n.meta["shape"], torch.nan)] * 4)


def _scaled(x: Moments, factor: float) -> Moments:
    """Those of ``factor * x``, for a positive factor."""
    return Moments(*(part * scale for part, scale in zip(x.parts, (factor, factor**2, factor, factor), strict=True)))


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], (tuple, list)):
        return tuple(_joined(list(each)) for each in zip(*parts, strict=True))
    return Moments(*parts)


def _compactly(function: Callable[[Moments], Moments], x: Moments) -> Moments:
    """Applies an elementwise function, once to values that are expanded over an axis."""
    shape = x.mean.shape
    first = [tuple(slice(1) if step == 0 else slice(None) for step in part.stride()) for part in x.parts]
    compact = Moments(*(part[index] for part, index in zip(x.parts, first, strict=True)))
    return Moments(*(part.expand(shape) for part in function(compact).parts))


def _cut(x: Moments, low: float, high: float) -> Moments:
    mean, variance = clipped_normal(x.mean, x.variance, low, high)
    return Moments(mean, variance, x.low.clamp(low, high), x.high.clamp(low, high))


def _function(module: nn.Module, x: Moments) -> Moments:
    """A function of one value: its moments over the normal distribution, its bounds over the interval."""
    z = torch.linspace(-4.0, 4.0, _POINTS, dtype=x.mean.dtype)
    weights = torch.exp(-z.square() / 2)
    weights = (weights / weights.sum()).view(-1, *[1] * x.mean.ndim)
    z = z.view_as(weights)
    y = module((x.mean + x.variance.sqrt() * z).clamp(x.low, x.high))
    mean = (y * weights).sum(0)
    ends = torch.linspace(0.0, 1.0, _POINTS, dtype=x.mean.dtype).view_as(weights)
    reached = module(x.low + (x.high - x.low) * ends)
    return Moments(mean, ((y - mean).square() * weights).sum(0), reached.amin(0), reached.amax(0))


def _add(a: Moments, b: Moments) -> Moments:
    return Moments.normal(a.mean + b.mean, a.variance + b.variance, a.low + b.low, a.high + b.high)


def _multiply(a: Moments, b: Moments) -> Moments:
    second = (a.variance + a.mean.square()) * (b.variance + b.mean.square())
    mean = a.mean * b.mean
    ends = torch.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
    return Moments(mean, (second - mean.square()).clamp(min=0.0), ends.amin(0), ends.amax(0))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a layer is a matrix at each position: linear, or a convolution of single pixels."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}
    )


def _weighted(module: nn.Module, x: Moments) -> Moments:
    """``E[y] = W E[x] + b``, ``Var[y] = W^2 Var[x]``."""
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach().float().cpu()
    bias = module.bias.detach().float().cpu() if isinstance(module.bias, Tensor) else torch.zeros(len(weight))

    def apply(weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (values,))
        return y

    mean, variance = apply(weight, bias, x.mean), apply(weight.square(), torch.zeros_like(bias), x.variance)
    return Moments.normal(mean, variance, -math.inf, math.inf)
