"""The layers without weights against int64 arithmetic, on scales that make ties: not one code may differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import oracle
import pytest
import torch
from oracle import Codes, Ints, f32
from torch import Tensor, nn

from qlib.graph.ops import Add, Concat, GlobalAvgPool, MatMul, Mul
from qlib.lower.base import LOWERINGS, ActivationGrid, LayerContext
from qlib.lower.ops.quantize import Dequantize, Quantize
from qlib.quant.plan import LayerPlan, WeightPlan
from qlib.quant.spec import QuantSpec

TIES = [
    (2**-4, 2**-4, 2**-3),
    (2**-4, 3 * 2**-4, 2**-3),
    (5 * 2**-5, 7 * 2**-5, 2**-2),
    (2**-6, 11 * 2**-6, 3 * 2**-5),
    (0.1, 0.3, 0.2),
    (0.0130718, 0.0261437, 0.0392156),
]
"""Scales of two inputs and the output: ratios are k / 16, or a few ulp beside."""
ZEROS = [(0, 0, 0), (7, 128, 3), (128, 127, 127), (255, 1, 201)]
GRIDS = [(*scales, *zeros) for scales in TIES for zeros in ZEROS]
PAIRS = np.divmod(np.arange(65536), 256)


def grids(scales: Sequence[float], zeros: Sequence[int], mode: str = "asym_u") -> tuple[Codes, ...]:
    return tuple(Codes.of(mode, 8, scale, zero) for scale, zero in zip(scales, zeros, strict=True))


def run(kind: str, module: nn.Module, inputs: Sequence[Codes], y: Codes, codes: Sequence[Ints | Tensor]) -> Ints:
    """Deployed output codes of the layer; `codes` are numpy codes, or tensors of centered codes."""
    lowered, grid = LOWERINGS[kind](LayerContext(module, LayerPlan(kind), tuple(x.grid for x in inputs), y.grid))
    assert grid is not None
    args = [q if isinstance(q, Tensor) else x.centered(q) for q, x in zip(codes, inputs, strict=True)]
    before = [arg.clone() for arg in args]
    with torch.inference_mode():
        out = lowered(*args)
    assert all(map(torch.equal, args, before)), "the inputs are left as they were"
    return out.numpy().astype(np.int64) + int(grid.zero_point)


@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
@pytest.mark.parametrize("scales", TIES, ids=str)
def test_add_all_pairs(scales: tuple[float, ...], mode: str) -> None:
    for zeros in ZEROS:
        a, b, y = grids(scales, zeros, mode)
        want = oracle.add(PAIRS[0], a.deployed, PAIRS[1], b.deployed, y.deployed)
        assert (run("add", Add(), (a, b), y, (PAIRS[0] + a.low, PAIRS[1] + b.low)) == want).all()


@pytest.mark.parametrize("scales", TIES, ids=str)
def test_mul_all_pairs(scales: tuple[float, ...]) -> None:
    for zeros, mode in itertools.product(ZEROS, ("asym_u", "asym_s")):
        for shrink in (1.0, 64.0):  # the output grid so wide that few results saturate
            a, b, y = grids((*scales[:2], scales[0] * scales[2] * shrink), zeros, mode)
            want = oracle.mul(PAIRS[0], a.deployed, PAIRS[1], b.deployed, y.deployed)
            assert (run("mul", Mul(), (a, b), y, (PAIRS[0] + a.low, PAIRS[1] + b.low)) == want).all()


@pytest.mark.parametrize("factors", [(0.2, 1.0), (1.0, 1 / 3), (0.7, 3.0)], ids=str)
def test_factors_are_in_the_scales(factors: tuple[float, float]) -> None:
    for scales, zeros in itertools.product(TIES, ZEROS):
        a, b, y = grids(scales, zeros)
        codes = (PAIRS[0] + a.low, PAIRS[1] + b.low)
        scaled = [Codes.of("asym_u", 8, float(x.scale * f32(f)), x.zero) for x, f in zip((a, b), factors, strict=True)]
        assert (
            run("add", Add(factors), (a, b), y, codes) == oracle.add(PAIRS[0], scaled[0], PAIRS[1], scaled[1], y)
        ).all()
        product = oracle.mul(PAIRS[0], scaled[0], PAIRS[1], b, y)
        assert (run("mul", Mul(alpha=factors[0]), (a, b), y, codes) == product).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("small", [(2, 6, 1, 1), (1, 6, 9, 7), (6, 1, 1), (1,)], ids=str)
def test_broadcast_both_ways(kind: str, layout: str, small: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    module, formula = (Add(), oracle.add) if kind == "add" else (Mul(), oracle.mul)
    for scales, zeros in itertools.product(TIES, ZEROS):
        a, b, y = grids(scales, zeros)
        qa, qb = a.random(rng, 2, 6, 9, 7), rng.integers(0, 256, small)
        big = LAYOUTS[layout](a.centered(qa))
        want = formula(qa, a, qb, b, y)
        assert (run(kind, module, (a, b), y, (big, b.centered(qb))) == want).all()
        assert (run(kind, module, (b, a), y, (b.centered(qb), big)) == want).all(), (
            "a broadcast first input swaps roles"
        )


@pytest.mark.parametrize(("top", "bounds"), [(np.inf, (31, 255)), (6.0, (31, 79))], ids=["relu", "relu6"])
def test_fused_activation_clamps_the_output(top: float, bounds: tuple[int, int]) -> None:
    a, b, y = grids((2**-4, 2**-4, 2**-3 if top == 6.0 else 2**-5), (128, 128, 31))
    qa, qb = PAIRS
    grid = ActivationGrid.of(y.grid.params, (0.0, top))
    lowered, _ = LOWERINGS["add"](LayerContext(Add(), LayerPlan("add"), (a.grid, b.grid), grid))
    got = lowered(a.centered(qa), b.centered(qb)).numpy().astype(np.int64) + 31
    assert (got.min(), got.max()) == bounds
    assert (got == np.clip(oracle.add(qa, a, qb, b, y), *bounds)).all()


@pytest.mark.parametrize("scales", TIES, ids=str)
@pytest.mark.parametrize("size", [8, 700], ids=["float32", "float64"])
def test_matmul(scales: tuple[float, ...], size: int) -> None:
    rng = np.random.default_rng(1)
    for zeros, alpha in itertools.product(ZEROS, (1.0, 0.125, 1 / 3)):
        a, b, y = grids((*scales[:2], scales[2] * size / 4), zeros)
        for transpose, left, right in [(False, (3, 5, size), (3, size, 4)), (True, (2, 2, 5, size), (2, 2, 6, size))]:
            qa, qb = a.random(rng, *left), b.random(rng, *right)
            acc = (qa - a.zero) @ (np.swapaxes(qb - b.zero, -1, -2) if transpose else qb - b.zero)
            want = oracle.requantize(acc, (a.scale * f32(alpha) * b.scale) / y.scale, y)
            got = run("matmul", MatMul(transpose=transpose, alpha=alpha), (a, b), y, (qa, qb))
            assert (got == want).all()


@pytest.mark.parametrize("scales", TIES, ids=str)
def test_concat_requantizes_each_input(scales: tuple[float, ...]) -> None:
    every = np.arange(256).reshape(1, 4, 8, 8)
    for zeros in ZEROS:
        a, b, y = grids(scales, zeros)
        same = Codes.of("asym_u", 8, scales[2], zeros[2])
        values = [((every - x.zero).astype(f32) * x.scale) for x in (a, b)]
        want = np.concatenate([*(oracle.quantize(v, y) for v in values), every], 1)
        assert (run("concat", Concat(1), (a, b, same), y, (every, every, every)) == want).all()


POOLS = {
    "2x2": nn.AvgPool2d(2),
    "3x3 overlapping": nn.AvgPool2d(3, stride=2),
    "padded": nn.AvgPool2d(3, stride=2, padding=1),
    "padding not counted": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "ceil mode": nn.AvgPool2d((2, 3), stride=2, ceil_mode=True),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "7x7": nn.AvgPool2d(7, stride=1),
}


def windows(pool: nn.AvgPool2d, shape: tuple[int, ...]) -> list[tuple[int, int, slice, slice, int]]:
    """Row, column, the rows and columns of each window that lie in the image, and what its sum is divided by."""

    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    def axis(size: int, kernel: int, stride: int, pad: int) -> list[tuple[slice, int]]:
        room = size + 2 * pad - kernel
        count = (-(-room // stride) if pool.ceil_mode else room // stride) + 1
        count -= (count - 1) * stride >= size + pad
        starts = [i * stride - pad for i in range(count)]
        ends = [min(start + kernel, size + pad) for start in starts]
        return [(slice(max(s, 0), min(e, size)), e - s) for s, e in zip(starts, ends, strict=True)]

    axes = zip(shape[2:], pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), strict=True)
    (rows, columns), found = [axis(*one) for one in axes], []
    for (i, (row, high)), (j, (column, wide)) in itertools.product(enumerate(rows), enumerate(columns)):
        inside = (row.stop - row.start) * (column.stop - column.start)
        count = pool.divisor_override or (high * wide if pool.count_include_pad else inside)
        found.append((i, j, row, column, count))
    return found


def average(pool: nn.AvgPool2d, q: Ints, x: Codes, y: Codes) -> Ints:
    """QLinearAveragePool: a window is summed in float32, row by row; the zero point is inside the rounding."""
    values = (q - x.zero).astype(f32) * x.scale
    cells = windows(pool, q.shape)
    out = np.zeros((*q.shape[:2], 1 + max(c[0] for c in cells), 1 + max(c[1] for c in cells)), np.int64)
    for i, j, row, column, count in cells:
        total = np.zeros(q.shape[:2], f32)
        for r, c in itertools.product(range(row.start, row.stop), range(column.start, column.stop)):
            total = total + values[:, :, r, c]
        out[:, :, i, j] = np.clip(np.rint(total / f32(count) / y.scale + f32(y.zero)).astype(np.int64), y.low, y.high)
    return out


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_average_pool(name: str, layout: str) -> None:
    rng = np.random.default_rng(2)
    for (sx, _, sy), zeros in itertools.product(TIES, ZEROS):
        x, y = grids((sx, sy / 4), zeros[1:])
        q = x.random(rng, 2, 5, 9, 8)
        got = run("avg_pool", POOLS[name], (x,), y, (LAYOUTS[layout](x.centered(q)),))
        assert (got == average(POOLS[name], q, x, y)).all()


@pytest.mark.parametrize("size", [(7, 7), (4, 4), (1, 1), (260, 260)], ids=str)
@pytest.mark.parametrize(
    "module", [nn.AdaptiveAvgPool2d(1), GlobalAvgPool(keepdim=False)], ids=["keeps axes", "drops axes"]
)
def test_global_average_pool(module: nn.Module, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    for (sx, _, sy), zeros in itertools.product(TIES, ZEROS):
        x, y = grids((sx, sy / 4), zeros[1:])
        q = x.random(rng, 2, 4 if size[0] < 100 else 2, *size)
        total = (q - x.zero).sum((2, 3), keepdims=isinstance(module, nn.AdaptiveAvgPool2d))
        want = oracle.requantize(total, x.scale / (y.scale * f32(size[0] * size[1])), y)
        assert (run("global_avg_pool", module, (x,), y, (q,)) == want).all()


@pytest.mark.parametrize("side", [3, 5, 7])
def test_global_average_pool_of_every_sum(side: int) -> None:
    """Scales that put sums beside a tie: there the order of the two divisions shows."""
    count = side * side
    sums = np.arange(0, count * 255)[:, None]
    q = (sums // count + (np.arange(count) < sums % count)).reshape(1, -1, side, side)
    for sx, half_steps in itertools.product((0.1, 0.0131, 0.7, 1 / 3), (1, 3, 5, 7)):
        x, y = grids((sx, sx / count * 2 * half_steps * side), (0, 3))
        want = oracle.requantize((q - x.zero).sum((2, 3), keepdims=True), x.scale / (y.scale * f32(count)), y)
        assert (run("global_avg_pool", nn.AdaptiveAvgPool2d(1), (x,), y, (q,)) == want).all()


@pytest.mark.parametrize("shape", [(64, 10), (2, 3, 5, 49), (3, 1000), (4, 1)], ids=str)
@pytest.mark.parametrize("scale", [2**-4, 0.1, 0.0235, 1e-3, 0.7])
def test_softmax(shape: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng(4)
    x, y = Codes.of("asym_u", 8, scale, 117), Codes.of("asym_u", 8, 2**-8)
    q = x.random(rng, *shape)
    module = nn.Softmax(-1)
    assert (run("softmax", module, (x,), y, (q,)) == oracle.softmax(q, x, y)).all()
    shorter = q[..., : max(1, shape[-1] // 2)]  # the table depends on the length of a row
    assert (run("softmax", module, (x,), y, (shorter,)) == oracle.softmax(shorter, x, y)).all()


@pytest.mark.parametrize("axis", [1, -2, 3])
def test_softmax_over_any_axis(axis: int) -> None:
    x, y = Codes.of("asym_u", 8, 0.0235, 117), Codes.of("asym_u", 8, 2**-8)
    q = x.random(np.random.default_rng(4), 2, 49, 7, 5)
    want = np.moveaxis(oracle.softmax(np.moveaxis(q, axis, -1), x, y), -1, axis)
    assert (run("softmax", nn.Softmax(axis), (x,), y, (q,)) == want).all()


def test_softmax_by_hand() -> None:
    x, y = Codes.of("asym_u", 8, 1.0), Codes.of("asym_u", 8, 2**-8)
    got = run("softmax", nn.Softmax(-1), (x,), y, (np.array([[3, 3], [0, 5], [0, 255]]),))
    assert got.tolist() == [[128, 128], [2, 254], [0, 255]]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
def test_embedding(mode: str, bits: int) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(20, 6)
    plan = LayerPlan("embedding", weight=WeightPlan(QuantSpec.of_mode(mode, bits)))
    lowered, grid = LOWERINGS["embedding"](LayerContext(module, plan, (None,), None))
    assert grid is None
    scale, zero, codes = oracle.weight_grid(module.weight.detach().numpy(), mode, bits, False)
    indices = torch.tensor([[0, 3], [19, 3]])
    want = (codes - zero).astype(f32) * scale
    assert np.array_equal(lowered(indices).numpy(), want[indices.numpy()])


@pytest.mark.parametrize("zero", [0, 1, 128, 255])
def test_relu_and_max_pool_act_on_codes(zero: int) -> None:
    x = Codes.of("asym_u", 8, 0.05, zero)
    q = np.random.default_rng(5).integers(0, 256, (2, 3, 8, 8))
    q.flat[:2] = 0, 255
    assert (run("relu", nn.ReLU(), (x,), x, (q,)) == np.maximum(q, zero)).all()
    assert (run("relu", nn.ReLU6(), (x,), x, (q,)) == np.clip(q, zero, min(255, zero + 120))).all()
    pooled = q.reshape(2, 3, 4, 2, 4, 2).max((3, 5))
    assert (run("max_pool", nn.MaxPool2d(2), (x,), x, (q,)) == pooled).all()
    padded = run("max_pool", nn.MaxPool2d(3, 1, 1), (x,), x, (np.zeros((1, 1, 2, 2), np.int64),))
    assert (padded == 0).all(), "padding is below every code"


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
@pytest.mark.parametrize("scale", [2**-3, 3 * 2**-5, 0.1, 1 / 3])
def test_quantize_and_dequantize(mode: str, scale: float) -> None:
    y = Codes.of(mode, 8, scale, 77)
    x = np.concatenate([(np.arange(-600, 600) / 2).astype(f32) * y.scale, np.random.default_rng(6).normal(0, 9, 999)])
    x = np.concatenate([x.astype(f32), f32([1e30, -1e30, np.inf, -np.inf])])
    centered = Quantize(y.grid)(torch.from_numpy(x))
    with np.errstate(invalid="ignore", over="ignore"):
        want = np.clip(np.rint(x / y.scale) + y.zero, y.low, y.high).astype(np.int64)
    assert (centered.numpy().astype(np.int64) + y.zero == want).all()
    assert (Dequantize(y.grid)(centered).numpy() == (want - y.zero).astype(f32) * y.scale).all()


def test_the_scales_above_make_ties() -> None:
    ties = []
    for scales, zeros in itertools.product(TIES[:4], ZEROS):
        a, b, y = grids(scales, zeros)
        total = ((PAIRS[0] - a.zero) * float(a.scale) + (PAIRS[1] - b.zero) * float(b.scale)) / float(y.scale)
        ties.append(np.mean(np.mod(total, 1) == 0.5))
    assert np.mean(ties) > 0.1


@pytest.mark.parametrize("kind", ["add", "mul", "concat", "matmul", "avg_pool", "global_avg_pool", "softmax"])
@pytest.mark.parametrize("inputs", ["codes", "float"])
@pytest.mark.parametrize("output", ["codes", "float"])
def test_any_side_may_be_float(kind: str, inputs: str, output: str) -> None:
    modules = {"add": Add(), "mul": Mul(), "concat": Concat(1), "matmul": MatMul(transpose=True)}
    module = (
        modules.get(kind)
        or {
            "avg_pool": nn.AvgPool2d(2),
            "global_avg_pool": nn.AdaptiveAvgPool2d(1),
            "softmax": nn.Softmax(-1),
        }[kind]
    )
    x = Codes.of("asym_u", 8, 0.02, 100)
    y = (
        Codes.of("asym_u", 8, 2**-8)
        if kind == "softmax"
        else Codes.of("asym_u", 8, 0.8 if kind == "matmul" else 0.05, 99)
    )
    rng = np.random.default_rng(8)
    args = [x.centered(x.random(rng, 2, 3, 4, 4)) for _ in range(2 if kind in modules else 1)]
    grids = tuple(x.grid if inputs == "codes" else None for _ in args)
    lowered, grid = LOWERINGS[kind](LayerContext(module, LayerPlan(kind), grids, y.grid if output == "codes" else None))
    assert (grid is None) == (output == "float")
    values = [arg * float(x.scale) for arg in args]
    got = lowered(*(args if inputs == "codes" else values))
    want = module(*values)
    if output == "float":
        assert torch.allclose(got, want, atol=1e-4)
    else:
        limits = (y.low - y.zero) * float(y.scale), (y.high - y.zero) * float(y.scale)
        assert torch.allclose(got * float(y.scale), want.clamp(*limits), atol=float(y.scale) * 0.51)
