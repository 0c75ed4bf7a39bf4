"""Modules that stand for functional ops in a captured graph, so that each has a name, a kind and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Add",
    "ChannelAffine",
    "Concat",
    "Formula",
    "Function",
    "GlobalAvgPool",
    "MaskedSoftmax",
    "MatMul",
    "Mul",
    "Op",
]


class Op(nn.Module):
    """Base of the modules below: the tracer does not look inside."""


def times(x: Tensor, factor: float) -> Tensor:
    """The product, without one where the factor is 1."""
    return x if factor == 1.0 else x * factor


class Add(Op):
    """``alpha * a + beta * b`` with broadcasting; `factors` are alpha and beta.

    >>> Add((0.5, 1.0))(torch.tensor([4.0]), torch.tensor([1.0]))
    tensor([3.])
    """

    def __init__(self, factors: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return times(a, self.factors[0]) + times(b, self.factors[1])


class Mul(Op):
    """``alpha * a * b`` with broadcasting.

    >>> Mul(alpha=0.5)(torch.tensor([4.0]), torch.tensor([3.0]))
    tensor([6.])
    """

    def __init__(self, *, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return times(a, self.alpha) * b


class ChannelAffine(nn.Conv2d):
    """``x * gain + bias`` for each channel of ``[N, C, H, W]``: a batch-norm that no layer absorbs.

    As a depthwise convolution it is computed in integers, by the kernel of convolutions.
    """

    def __init__(self, gain: Tensor, bias: Tensor) -> None:
        super().__init__(len(gain), len(gain), 1, groups=len(gain), device=gain.device, dtype=gain.dtype)
        self.weight = nn.Parameter(gain.detach().view(-1, 1, 1, 1))
        self.bias = nn.Parameter(bias.detach())


class Concat(Op):
    """Concatenation along `dim`; takes the tensors one by one."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.dim)


class MatMul(Op):
    """``alpha * a @ b``, batched; `transpose` swaps the last two axes of `b` first.

    >>> MatMul(transpose=True, alpha=0.5)(torch.ones(1, 4), torch.ones(3, 4))
    tensor([[2., 2., 2.]])
    """

    def __init__(self, *, transpose: bool = False, alpha: float = 1.0) -> None:
        super().__init__()
        self.transpose, self.alpha = transpose, alpha

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = b.transpose(-2, -1) if self.transpose else b
        return torch.matmul(times(a, self.alpha), b)


class GlobalAvgPool(Op):
    """Mean over the two spatial axes of ``[N, C, H, W]``."""

    def __init__(self, *, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keepdim)


class Result:
    """One of the results of a function that has several, such as the maximum of ``torch.max(x, 1)``."""

    def __init__(self, function: Callable[..., Any], index: int) -> None:
        self.function, self.index = function, index
        self._schema, self.__name__ = getattr(function, "_schema", None), getattr(function, "__name__", "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)[self.index]


class Function(Op):
    """A function computed in float: `template` holds its arguments, with ``Slot(i)`` for the i-th tensor input."""

    class Slot(int):
        """The place of a tensor input in `template`."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        constants: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, tuple(args), dict(kwargs)
        for index, value in enumerate(constants):
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"constant_{index}", value)
            else:
                self.register_buffer(f"constant_{index}", value)

    def forward(self, *tensors: Tensor) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, Function.Slot):
                return tensors[value] if value >= 0 else getattr(self, f"constant_{-1 - value}")
            if isinstance(value, (list, tuple)):
                return type(value)(fill(item) for item in value)
            return value

        return self.function(*map(fill, self.args), **{key: fill(value) for key, value in self.kwargs.items()})

    @property
    def title(self) -> str:
        """The function's name, without the overload of an ATen op.

        >>> Function(torch.ops.aten.mul.Tensor, (), {}).title, Function(torch.sin, (), {}).title
        ('mul', 'sin')
        """
        schema = getattr(self.function, "_schema", None)
        name = getattr(self.function, "__name__", str(self.function))
        return name if schema is None else str(schema.name).rpartition("::")[2]

    def extra_repr(self) -> str:
        return self.title


class Formula(Op):
    """Computes a tensor of a graph that trains from parameters of the model, which `program` holds; takes no input.

    As a parametrization it is given the tensor that it stands for, and does not read it.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *_: Tensor) -> Tensor:
        value: Tensor = self.program()
        return value


class MaskedSoftmax(Op):
    """``softmax(x + mask)`` over `dim`: zeros and large negative numbers are added first, where `x` has another shape.

    `shape` is that of `x` where the mask is added, without its first axis; None: as it is.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, dim: int, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dim, self.shape = dim, None if shape is None else tuple(shape)
        self.register_buffer("mask", mask.detach())

    def masked(self, x: Tensor) -> Tensor:
        """`x` with the mask added.

        >>> mask = torch.tensor([[0.0, -100.0]])
        >>> MaskedSoftmax(mask, -1).masked(torch.ones(1, 2))
        tensor([[  1., -99.]])
        """
        if self.shape is None:
            return x + self.mask
        return (x.reshape(-1, *self.shape) + self.mask).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.masked(x), self.dim)
