"""Layer kinds: what each kind of layer is, and what it can do, said once.

Planner, lowerings, reports and exports ask this table. A new kind is a row here, the file of its exact form in
`lower/ops`, and a row in `aten` that says which op it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torchvision.ops import StochasticDepth

from qlib.graph import ops

__all__ = ["DROPOUTS", "ELEMENTWISE", "IN_FLOAT", "KINDS", "LAYER_KINDS", "LayerKind", "kind_of", "layer_kind"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, StochasticDepth)
"""Modules that change values at random while a model trains, and not in evaluation."""

ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Softplus, nn.Mish),
)
"""Modules that compute each element from that element alone."""

IN_FLOAT = "computed in float between integer tensors"
"""Of a layer, in the notes of a plan; what follows a colon says why."""


def _any(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer: the classes of its modules, and its properties.

    `integer_bits`: up to how many bits of activations it computes in integers, 0 for never; `integer_if` and `and_if`,
    its words, restrict that to some modules.
    `weighted`: it has a weight that can be quantized; `accumulates`: it adds up products, in an accumulator;
    `keeps_grid`: it acts on quantized values as they are, and its output is on the grid of its input; `pools`: it takes
    a maximum or a mean of each channel; `is_relu`: it clamps at 0; `moves`: it only moves values, and is no layer.
    `fuses_relu`: the clamp of its output computes a ReLU after it for free; `shares_grid`: it puts layers side by side,
    which get its grid; `fixed_grid`: the grid of its output follows from its bits, not from a range.
    `onnx`: the float operators of ONNX that ONNX Runtime replaces by integer kernels where their pattern is right.
    """

    name: str
    types: tuple[type[nn.Module], ...] = ()
    integer_bits: int = 0
    weighted: bool = False
    accumulates: bool = False
    keeps_grid: bool = False
    is_relu: bool = False
    pools: bool = False
    moves: bool = False
    fuses_relu: bool = False
    shares_grid: bool = False
    fixed_grid: bool = False
    onnx: tuple[str, ...] = ()
    includes: Callable[[nn.Module], bool] = _any
    integer_if: Callable[[nn.Module], bool] = _any
    and_if: str = ""

    @property
    def affine(self) -> bool:
        """Whether it is ``y = W x + b``: a convolution or a linear layer."""
        return self.weighted and self.accumulates

    @property
    def has_output_grid(self) -> bool:
        """Whether its output gets a grid of its own: that of a table's rows is the table's."""
        return not self.keeps_grid and (self.accumulates or not self.weighted)

    def float_reason(
        self, module: nn.Module, inputs: Sequence[int | None], output: int | None, *, quantized_weight: bool
    ) -> str:
        """Why a layer computes in float; empty where it computes in integers.

        `inputs` and `output` are the bits of the grids that its values arrive and leave on, None for float.

        >>> add = KINDS["add"]
        >>> add.float_reason(ops.Add(), (8, 8), 8, quantized_weight=False)
        ''
        >>> add.float_reason(ops.Add(), (8, None), 8, quantized_weight=False)
        'an input is float'
        >>> add.float_reason(ops.Add(), (8, 12), 8, quantized_weight=False)
        'computed in float between integer tensors: the integer form is that of at most 8 bits'
        """
        if self.weighted and not quantized_weight:
            return IN_FLOAT if self.accumulates else "its weight is float"
        if self.keeps_grid:
            return "its input is float" if inputs[0] is None else ""
        if not self.integer_bits:
            return f"{IN_FLOAT}: no integer form"
        if self.weighted and not self.accumulates:
            return ""
        if None in inputs or output is None:
            return "an input is float" if None in inputs else "its output is float"
        widest = max(output, *(bits for bits in inputs if bits is not None))
        if widest > self.integer_bits or not self.integer_if(module):
            return f"{IN_FLOAT}: the integer form is that of at most {self.integer_bits} bits{self.and_if}"
        return ""


def _pools_all(module: nn.Module) -> bool:
    return not isinstance(module, nn.AdaptiveAvgPool2d) or module.output_size in (1, (1, 1))


def _plain_softmax(module: nn.Module) -> bool:
    return isinstance(module, nn.Softmax)


_WIDE, _BYTES = 16, 8

_ROWS = (
    LayerKind(
        "conv",
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _WIDE,
        weighted=True,
        accumulates=True,
        fuses_relu=True,
        onnx=("Conv",),
    ),
    LayerKind(
        "conv_transpose",
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        _WIDE,
        weighted=True,
        accumulates=True,
        fuses_relu=True,
    ),
    LayerKind("linear", (nn.Linear,), _WIDE, weighted=True, accumulates=True, fuses_relu=True, onnx=("Gemm", "MatMul")),
    LayerKind("embedding", (nn.Embedding,), _WIDE, weighted=True),
    LayerKind("matmul", (ops.MatMul,), _WIDE, accumulates=True, fuses_relu=True, onnx=("MatMul",)),
    LayerKind("add", (ops.Add,), _BYTES, fuses_relu=True, onnx=("Add",)),
    LayerKind("mul", (ops.Mul,), _BYTES, fuses_relu=True, onnx=("Mul",)),
    LayerKind("concat", (ops.Concat,), _BYTES, fuses_relu=True, shares_grid=True, onnx=("Concat",)),
    LayerKind("relu", (nn.ReLU, nn.ReLU6), _WIDE, keeps_grid=True, is_relu=True, onnx=("Relu", "Clip")),
    LayerKind(
        "max_pool",
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        _WIDE,
        keeps_grid=True,
        pools=True,
        onnx=("MaxPool",),
    ),
    LayerKind(
        "avg_pool",
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        _BYTES,
        pools=True,
        fuses_relu=True,
        onnx=("AveragePool",),
    ),
    LayerKind(
        "global_avg_pool",
        (ops.GlobalAvgPool, nn.AdaptiveAvgPool2d),
        _BYTES,
        pools=True,
        includes=_pools_all,
        onnx=("GlobalAveragePool",),
    ),
    LayerKind(
        "softmax",
        (nn.Softmax, ops.MaskedSoftmax),
        _BYTES,
        fixed_grid=True,
        integer_if=_plain_softmax,
        and_if=", without a mask",
        onnx=("Softmax",),
    ),
    LayerKind("move", (*DROPOUTS, ops.Formula), keeps_grid=True, moves=True),  # of a graph that trains
    LayerKind("float_op", (nn.Module,), fuses_relu=True, onnx=("Sigmoid", "LeakyRelu")),
)

KINDS: Mapping[str, LayerKind] = {kind.name: kind for kind in _ROWS}
"""Name -> kind; the last one takes what no other does."""

LAYER_KINDS = tuple(kind.name for kind in _ROWS if not kind.moves)
"""The kinds that change values: those of a plan."""


def layer_kind(module: nn.Module) -> LayerKind:
    """The kind of a module; ``float_op`` for what has no integer form."""
    return next(kind for kind in _ROWS if isinstance(module, kind.types) and kind.includes(module))


def kind_of(module: nn.Module) -> str:
    """The name of a module's kind.

    >>> kind_of(nn.Conv2d(1, 1, 1)), kind_of(nn.GELU()), kind_of(nn.Dropout())
    ('conv', 'float_op', 'move')
    """
    return layer_kind(module).name
