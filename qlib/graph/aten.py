"""ATen ops as modules: one row an op, whatever its spelling in the model was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from qlib.graph import ops

__all__ = ["Arguments", "arguments_of", "is_plain_product", "layer_of"]

Arguments = dict[str, Any]
"""The arguments of an op by their names in its schema: nodes, model tensors where they are constants, plain values."""

Layer = tuple[nn.Module, Sequence[Any]]


def arguments_of(node: fx.Node) -> Arguments:
    """All arguments of an op, defaults included.

    >>> import torch
    >>> node = fx.Graph().call_function(torch.ops.aten.softmax.int, (1, -1))
    >>> arguments_of(node) == {"self": 1, "dim": -1, "dtype": None}
    True
    """
    names = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(names, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in names if argument.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def layer_of(op: str, arguments: Arguments, shape: Sequence[int]) -> Layer | None:
    """The module that computes what an op does, and its tensor inputs; None for an op without one.

    `shape` is that of the first input. Weights are the tensors in `arguments`, and not copied.
    """
    build = _BUILDERS.get(op)
    return build(arguments, shape) if build is not None else None


def _weight(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """Puts the model's own tensors into a module that was built without any."""
    for name, value in tensors.items():
        if value is None:
            setattr(module, name, None)
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            module._parameters[name] = parameter
    return module


def _fixed(arguments: Arguments, *names: str) -> bool:
    """Whether the weights are tensors of the model, or absent, and not computed from the images."""
    return all(isinstance(arguments.get(name), (Tensor, type(None))) for name in names)


def _convolution(kind: type[nn.Module], transposed: bool = False) -> Callable[[Arguments, Sequence[int]], Layer | None]:
    def build(given: Arguments, _: Sequence[int]) -> Layer | None:
        weight, bias = given["weight"], given.get("bias")
        if not _fixed(given, "weight", "bias") or weight is None:
            return None
        groups, dims = given.get("groups", 1), weight.ndim - 2
        outer, inner = weight.shape[0], weight.shape[1] * groups
        extra: dict[str, Any] = {}
        if transposed:
            outer, inner = inner, outer
            extra["output_padding"] = _each(given["output_padding"], dims)
        padding = given["padding"]
        module = kind(
            inner,
            outer,
            tuple(weight.shape[2:]),
            stride=_each(given["stride"], dims),
            padding=padding if isinstance(padding, str) else _each(padding, dims),
            dilation=_each(given["dilation"], dims),
            groups=groups,
            bias=bias is not None,
            device="meta",
            **extra,
        )
        return _weight(module, weight=weight, bias=bias), [given["input"]]

    return build


def _each(value: Sequence[int] | int, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _linear(given: Arguments, _: Sequence[int]) -> Layer | None:
    weight, bias = given["weight"], given.get("bias")
    if not _fixed(given, "weight", "bias") or weight is None or weight.ndim != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _weight(module, weight=weight, bias=bias), [given["input"]]


def _batch_norm(given: Arguments, shape: Sequence[int]) -> Layer | None:
    mean, kinds = given["running_mean"], {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if not _fixed(given, "weight", "bias", "running_mean", "running_var") or mean is None or len(shape) not in kinds:
        return None
    module = kinds[len(shape)](
        len(mean), eps=given["eps"], momentum=given["momentum"], affine=given["weight"] is not None, device="meta"
    )
    _weight(module, weight=given["weight"], bias=given["bias"])
    return _weight(module, running_mean=mean, running_var=given["running_var"]), [given["input"]]


def _layer_norm(given: Arguments, _: Sequence[int]) -> Layer | None:
    if not _fixed(given, "weight", "bias"):
        return None
    shape, affine = given["normalized_shape"], given["weight"] is not None
    module = nn.LayerNorm(
        list(shape), eps=given["eps"], elementwise_affine=affine, bias=given["bias"] is not None, device="meta"
    )
    return _weight(module, weight=given["weight"], bias=given["bias"]), [given["input"]]


def _group_norm(given: Arguments, shape: Sequence[int]) -> Layer | None:
    if not _fixed(given, "weight", "bias"):
        return None
    affine = given["weight"] is not None
    module = nn.GroupNorm(given["num_groups"], shape[1], eps=given["eps"], affine=affine, device="meta")
    return _weight(module, weight=given["weight"], bias=given["bias"]), [given["input"]]


def _embedding(given: Arguments, _: Sequence[int]) -> Layer | None:
    weight = given["weight"]
    if not _fixed(given, "weight"):
        return None
    module = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    return _weight(module, weight=weight), [given["indices"]]


def _activation(make: Callable[..., nn.Module], **options: str) -> Callable[[Arguments, Sequence[int]], Layer | None]:
    """A module of one input; `options` maps its keywords to names in the schema."""

    def build(given: Arguments, _: Sequence[int]) -> Layer | None:
        return make(**{key: given[name] for key, name in options.items()}), [given["self"]]

    return build


def _dropout(kind: type[nn.Module]) -> Callable[[Arguments, Sequence[int]], Layer | None]:
    return lambda given, _: (kind(float(given["p"])), [given["input"]])


def _channel_dropout(given: Arguments, shape: Sequence[int]) -> Layer | None:
    kind = {3: nn.Dropout1d, 5: nn.Dropout3d}.get(len(shape), nn.Dropout2d)
    return kind(float(given["p"])), [given["input"]]


def _hardtanh(given: Arguments, _: Sequence[int]) -> Layer | None:
    low, high = float(given["min_val"]), float(given["max_val"])
    return (nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)), [given["self"]]


def _clamp(given: Arguments, _: Sequence[int]) -> Layer | None:
    ends = given.get("min"), given.get("max")
    if ends == (0, None):
        return nn.ReLU(), [given["self"]]
    return (nn.ReLU6(), [given["self"]]) if ends == (0, 6) else None


def _binary(make: Callable[[], nn.Module]) -> Callable[[Arguments, Sequence[int]], Layer | None]:
    def build(given: Arguments, _: Sequence[int]) -> Layer | None:
        a, b = given["self"], given.get("other", given.get("mat2"))
        tensors = isinstance(a, (fx.Node, Tensor)) and isinstance(b, (fx.Node, Tensor)) and given.get("alpha", 1) == 1
        return (make(), [a, b]) if tensors else None

    return build


def _cat(given: Arguments, _: Sequence[int]) -> Layer | None:
    return ops.Concat(given["dim"]), list(given["tensors"])


def _softmax(given: Arguments, _: Sequence[int]) -> Layer | None:
    return nn.Softmax(given["dim"]), [given["self"]]


def _pool(kind: type[nn.Module], *names: str) -> Callable[[Arguments, Sequence[int]], Layer | None]:
    def build(given: Arguments, _: Sequence[int]) -> Layer | None:
        options = {name: _plain(given[name]) for name in names}
        if "stride" in options and not options["stride"]:
            options["stride"] = None
        return kind(**options), [given["self"]]

    return build


def _plain(value: Any) -> Any:
    """A list of equal numbers as that number, as people write it."""
    if isinstance(value, (list, tuple)) and value:
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _adaptive_pool(given: Arguments, _: Sequence[int]) -> Layer | None:
    return nn.AdaptiveAvgPool2d(_plain(given["output_size"])), [given["self"]]


def _mean(given: Arguments, shape: Sequence[int]) -> Layer | None:
    """Mean over both spatial axes is a global average pool; other means stay functions."""
    dims = given.get("dim")
    if len(shape) != 4 or not isinstance(dims, (list, tuple)) or sorted(dim % 4 for dim in dims) != [2, 3]:
        return None
    return ops.GlobalAvgPool(keepdim=bool(given["keepdim"])), [given["self"]]


def is_plain_product(equation: str) -> bool:
    """Whether an equation is a matrix product, batched, of the second operand as it is or transposed.

    >>> is_plain_product("bhid,bhjd->bhij"), is_plain_product("bij,bjd->bid"), is_plain_product("bhwc,hkc->bhwk")
    (True, True, False)
    """
    return _transposes(equation) is not None


def _transposes(equation: str) -> bool | None:
    """Whether a matrix product transposes its second operand; None for an equation that is none."""
    left, out = f"{equation}->".replace(" ", "").split("->")[:2]
    terms = left.split(",")
    if len(terms) != 2 or not out:
        return None
    (a, b), batch = terms, terms[0][:-2]
    if not a[:-2] == b[:-2] == out[:-2] == batch or len(set(a[-2:] + b[-2:])) != 3:
        return None
    if a[-1] == b[-1] and out[-2:] == a[-2] + b[-2]:
        return True
    return False if a[-1] == b[-2] and out[-2:] == a[-2] + b[-1] else None


def _einsum(given: Arguments, shape: Sequence[int]) -> Layer | None:
    """``"..id,..jd->..ij"`` and ``"..ij,..jd->..id"`` are matrix products; other equations stay functions."""
    transposes = _transposes(given["equation"])
    return None if transposes is None else (ops.MatMul(transpose=transposes), list(given["tensors"]))


_BUILDERS: dict[str, Callable[[Arguments, Sequence[int]], Layer | None]] = {
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "conv3d": _convolution(nn.Conv3d),
    "conv_transpose1d": _convolution(nn.ConvTranspose1d, transposed=True),
    "conv_transpose2d": _convolution(nn.ConvTranspose2d, transposed=True),
    "conv_transpose3d": _convolution(nn.ConvTranspose3d, transposed=True),
    "linear": _linear,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "relu": _activation(nn.ReLU),
    "relu6": _activation(nn.ReLU6),
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "sigmoid": _activation(nn.Sigmoid),
    "tanh": _activation(nn.Tanh),
    "silu": _activation(nn.SiLU),
    "gelu": _activation(nn.GELU, approximate="approximate"),
    "elu": _activation(nn.ELU, alpha="alpha"),
    "leaky_relu": _activation(nn.LeakyReLU, negative_slope="negative_slope"),
    "hardswish": _activation(nn.Hardswish),
    "hardsigmoid": _activation(nn.Hardsigmoid),
    "dropout": _dropout(nn.Dropout),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "feature_dropout": _channel_dropout,
    "feature_alpha_dropout": _dropout(nn.FeatureAlphaDropout),
    "softplus": _activation(nn.Softplus, beta="beta", threshold="threshold"),
    "mish": _activation(nn.Mish),
    "add": _binary(ops.Add),
    "mul": _binary(ops.Mul),
    "matmul": _binary(ops.MatMul),
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "softmax": _softmax,
    "_softmax": _softmax,
    "max_pool2d": _pool(nn.MaxPool2d, "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": _pool(
        nn.AvgPool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "einsum": _einsum,
}
