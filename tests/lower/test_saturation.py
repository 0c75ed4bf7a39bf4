"""16-bit sums of two products against int64 arithmetic, and against ONNX Runtime where this CPU has such sums."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Ints
from torch import Tensor, fx, nn

from qlib.graph import capture, kind_of
from qlib.lower import lower
from qlib.lower.ops.weighted import ExactWeighted
from qlib.lower.pairs import hazardous_pairs
from qlib.lower.saturation import SaturatingWeighted, SaturationRate, emulated, pairs_at_risk, saturation_rates
from qlib.ptq.reduce_range import reduce_range
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pointwise": (nn.Conv2d(16, 8, 1), (2, 16, 5, 5)),
    "pointwise, odd channels": (nn.Conv2d(13, 8, 1, bias=False), (2, 13, 4, 4)),
    "3x3": (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 7)),
    "3x3, odd channels": (nn.Conv2d(5, 12, 3, padding=1), (2, 5, 6, 7)),
    "first layer": (nn.Conv2d(3, 16, 7, stride=2, padding=3), (2, 3, 17, 16)),
    "one channel in": (nn.Conv2d(1, 16, 3), (2, 1, 9, 9)),
    "strided": (nn.Conv2d(6, 8, 3, stride=(2, 3), padding=(2, 1)), (2, 6, 9, 9)),
    "strided, odd channels": (nn.Conv2d(7, 8, (3, 4), stride=(3, 2), padding=1), (2, 7, 9, 10)),
    "dilated": (nn.Conv2d(4, 8, 3, dilation=2, padding=2), (2, 4, 8, 8)),
    "dilated, strided, odd channels": (nn.Conv2d(3, 8, 3, dilation=(3, 2), stride=2), (2, 3, 11, 9)),
    "same padding, even kernel": (nn.Conv2d(4, 8, (2, 4), padding="same"), (2, 4, 6, 6)),
    "reflected": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "grouped": (nn.Conv2d(16, 12, 3, padding=1, groups=4), (2, 16, 5, 5)),
    "grouped, odd channels": (nn.Conv2d(9, 6, 3, groups=3), (2, 9, 5, 5)),
    "two outputs a channel": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "depthwise, one channel": (nn.Conv2d(1, 1, 3, padding=1), (2, 1, 8, 8)),
    "1d": (nn.Conv1d(5, 8, 3, padding=2, dilation=2), (2, 5, 14)),
    "1d depthwise": (nn.Conv1d(5, 5, 3, groups=5), (2, 5, 14)),
    "3d": (nn.Conv3d(3, 6, (2, 3, 2), stride=(1, 2, 1), padding=1), (1, 3, 4, 6, 5)),
    "linear": (nn.Linear(31, 12), (5, 31)),
    "linear, one row": (nn.Linear(64, 12, bias=False), (1, 64)),
    "linear of sequences": (nn.Linear(20, 7), (2, 3, 20)),
    "linear, long": (nn.Linear(2400, 4), (3, 2400)),
}
NEVER = ("depthwise", "depthwise, one channel", "1d depthwise")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def set_weight(layer: nn.Module, rng: np.random.Generator) -> None:
    """Large weights of both signs, so that saturation is frequent, and a bias."""
    assert isinstance(layer.weight, Tensor)
    shape = tuple(layer.weight.shape)
    layer.weight.data = torch.from_numpy(rng.uniform(0.5, 1.0, shape) * rng.choice([-1, 1, 1], shape)).float()
    if isinstance(layer.bias, Tensor):
        layer.bias.data = torch.from_numpy(rng.normal(0, 1, layer.bias.shape)).float()


def lowered_layer(
    layer: nn.Module, images: Tensor, weight: WeightPlan, act: TensorPlan, output: TensorPlan | None = None
) -> fx.GraphModule:
    reach = 2 * float(layer(images).detach().abs().max()) if output is None else 0.0
    output = output or TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-reach, max=reach)
    plan = LayerPlan(kind_of(layer), (act,), weight, output)
    return lower(capture(OneLayer(layer), images), Plan({"layer": plan}))


def columns(layer: nn.Module, q: Ints, zero: int) -> Ints:
    """``[N, groups, K, places]``: the deployed codes that each accumulator reads, in the order of the kernels."""
    if isinstance(layer, nn.Linear):
        return q.reshape(1, -1, q.shape[-1]).transpose(0, 2, 1)[:, None]
    assert isinstance(layer, nn.modules.conv._ConvNd)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    pads = [divmod(d * (k - 1), 2) for k, d in zip(kernel, dilation, strict=True)]
    pads = [(half, half + odd) for half, odd in pads]
    if layer.padding != "same":
        pads = [(int(p), int(p)) for p in layer.padding]
    around = [(0, 0), (0, 0), *pads]
    x = np.pad(q, around, constant_values=zero) if layer.padding_mode == "zeros" else np.pad(q, around, mode="reflect")
    sizes = [(s - d * (k - 1) - 1) // t + 1 for s, k, d, t in zip(x.shape[2:], kernel, dilation, stride, strict=True)]
    taps = []
    for at in itertools.product(*map(range, kernel)):
        axes = zip(at, dilation, stride, sizes, strict=True)
        taps.append(x[(slice(None), slice(None), *(slice(k * d, k * d + t * (n - 1) + 1, t) for k, d, t, n in axes))])
    read = np.stack(taps, 1).reshape(len(x), len(taps), layer.groups, -1, *sizes)
    return np.moveaxis(read, 2, 1).reshape(len(x), layer.groups, -1, int(np.prod(sizes)))


def expected(layer: nn.Module, exact: ExactWeighted, q: Ints, pairwise: bool) -> tuple[Ints, int, Ints]:
    """``[N, out, places]`` output codes, centered; how many accumulators saturated; and the accumulators."""
    w, zero = exact.weight_codes.numpy().astype(np.int64), exact.source.zero_point
    read = columns(layer, q, zero)
    w = np.moveaxis(w, 1, -1).reshape(read.shape[1], len(w) // read.shape[1], -1)
    products = read[:, :, None] * w[None, ..., None]
    products = np.pad(products, [(0, 0)] * 3 + [(0, w.shape[-1] % 2), (0, 0)])
    sums = products[..., 0::2, :] + products[..., 1::2, :]
    clipped = np.clip(sums, -(2**15), 2**15 - 1) if pairwise else sums
    zero_w = np.broadcast_to(exact.weight_zero_point.numpy(), w.shape[0] * w.shape[1]).reshape(w.shape[:2])
    acc = clipped.sum(3) - zero * w.sum(-1)[None, ..., None]
    acc = acc - zero_w[None, ..., None] * (read.sum(2)[:, :, None] - zero * w.shape[-1])
    acc = acc.reshape(len(acc), -1, acc.shape[-1])
    if exact.bias_codes is not None:
        acc = acc + exact.bias_codes.numpy().astype(np.int64)[None, :, None]
    assert exact.grid is not None
    factor = exact.factor.numpy().reshape(-1, 1)
    codes = np.clip(np.rint(acc.astype(np.float32) * factor).astype(np.int64), exact.grid.low, exact.grid.high)
    return codes, int((clipped != sums).any(3).sum()), acc


def places_last(layer: nn.Module, y: Tensor) -> Ints:
    """The output of a layer as ``[N, out, places]``."""
    flat = y.reshape(1, -1, y.shape[-1]).transpose(1, 2) if isinstance(layer, nn.Linear) else y.flatten(2)
    return flat.numpy().astype(np.int64)


ACTIVATIONS = {
    "zero point 0": TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=10.0),
    "zero point 50": TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-2.0, max=8.2),
    "zero point 230": TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-9.2, max=1.0),
    "signed": TensorPlan(QuantSpec.of_mode("sym", 8), min=-10.0, max=10.0),
}
WEIGHTS = {
    "sym": WeightPlan(QuantSpec.of_mode("sym", 8, 0)),
    "asym_s": WeightPlan(QuantSpec.of_mode("asym_s", 8)),
    "restr": WeightPlan(QuantSpec.of_mode("sym_restr", 8)),
}


@cache
def case(name: str, act: str, weight: str) -> tuple[nn.Module, fx.GraphModule, Ints]:
    """A layer, its lowered model, and deployed input codes."""
    layer, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    set_weight(layer, rng)
    lowered = lowered_layer(
        layer, torch.from_numpy(rng.uniform(0, 10, shape)).float(), WEIGHTS[weight], ACTIVATIONS[act]
    )
    return layer, lowered, np.where(rng.random(shape) < 0.7, rng.integers(190, 256, shape), rng.integers(0, 256, shape))


def modules(lowered: fx.GraphModule) -> tuple[ExactWeighted, SaturatingWeighted | ExactWeighted]:
    """The layer, and what stands for it in the emulated model."""
    exact, module = (model.get_submodule("layer") for model in (lowered, emulated(lowered)))
    assert isinstance(exact, ExactWeighted)
    assert isinstance(module, (SaturatingWeighted, ExactWeighted))
    return exact, module


@pytest.mark.parametrize(("act", "weight"), [*zip(ACTIVATIONS, ["sym", "asym_s", "restr", "sym"], strict=True)])
@pytest.mark.parametrize("name", LAYERS)
def test_emulated_codes_are_those_of_16_bit_sums(name: str, act: str, weight: str) -> None:
    layer, lowered, q = case(name, act, weight)
    exact, module = modules(lowered)
    codes, saturated, acc = expected(layer, exact, q, pairwise=name not in NEVER)
    with torch.inference_mode():
        got = places_last(layer, module(torch.from_numpy(q - exact.source.zero_point).float()))
    assert int((got != codes).sum()) == 0
    assert (name in NEVER) == (saturated == 0) == isinstance(module, ExactWeighted)
    if isinstance(module, SaturatingWeighted):
        assert (module.dtype == torch.float64) == (name == "linear, long")
        assert (module.rate.saturated, module.rate.outputs) == (saturated, acc.size)
        assert int((got != expected(layer, exact, q, pairwise=False)[0]).sum()) > 0


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's default kernels saturate on this CPU."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return False
    from onnx import TensorProto, helper

    product = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    codes, weight = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    (y,) = run_onnx([product], {"w": weight}, codes, TensorProto.INT32)
    assert int(y[0, 0]) in (1048544, 2072640)
    return int(y[0, 0]) == 1048544


def run_onnx(nodes: list[Any], constants: dict[str, Any], x: Any, output: int) -> Any:
    """The output y of a model of these nodes, with ONNX Runtime's default options; the only input is x, of uint8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    x_info = helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))
    graph = helper.make_graph(nodes, "layer", [x_info], [helper.make_tensor_value_info("y", output, None)], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def run_layer_in_onnx(layer: nn.Module, exact: ExactWeighted, q: Ints) -> Ints:
    """The deployed output codes of the layer between dequantize and quantize."""
    from onnx import TensorProto, helper

    assert exact.grid is not None
    scale = exact.weight_scale.numpy()
    constants: dict[str, Any] = {
        "sx": np.float32(exact.source.scale),
        "zx": np.uint8(exact.source.zero_point),
        "w": exact.weight_codes.numpy(),
        "sw": scale,
        "zw": exact.weight_zero_point.numpy().astype(exact.weight_codes.numpy().dtype),
        "sy": np.float32(exact.grid.scale),
        "zy": np.uint8(exact.grid.zero_point),
    }
    names = ["xf", "wf"]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
        helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
    ]
    if exact.bias_codes is not None:
        constants |= {"b": exact.bias_codes.numpy(), "sb": exact.source.scale.numpy() * scale}
        constants["zb"] = np.zeros(np.shape(scale), np.int32)
        nodes.insert(2, helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bf"], axis=0))
        names.append("bf")
    if isinstance(layer, nn.Linear):
        nodes.insert(-1, helper.make_node("Gemm", names, ["yf"], transB=1))
        q = q.reshape(-1, q.shape[-1])
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        before, after = [span // 2 for span in spans], [span - span // 2 for span in spans]
        pads = [*before, *after] if layer.padding == "same" else [*layer.padding, *layer.padding]
        options = {"strides": layer.stride, "dilations": layer.dilation, "pads": pads, "group": layer.groups}
        nodes.insert(-1, helper.make_node("Conv", names, ["yf"], **options))
    (y,) = run_onnx(nodes, constants, q.astype(np.uint8), TensorProto.UINT8)
    return places_last(layer, torch.from_numpy(y.astype(np.int64)))


@pytest.mark.parametrize(("act", "weight"), [("zero point 50", "asym_s"), ("signed", "sym")])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "reflected"])
def test_emulated_codes_are_those_of_onnx_runtime_on_such_a_cpu(name: str, act: str, weight: str) -> None:
    if not saturates():
        pytest.skip("ONNX Runtime is not installed, or does not saturate on this CPU")
    layer, lowered, q = case(name, act, weight)
    exact, module = modules(lowered)
    assert exact.grid is not None
    with torch.inference_mode():
        got = places_last(layer, module(torch.from_numpy(q - exact.source.zero_point).float()))
    deployed = run_layer_in_onnx(layer, exact, q)
    assert int((got.ravel() + exact.grid.zero_point != deployed.ravel()).sum()) == 0


@pytest.mark.parametrize(
    ("weights", "top", "pairs"),
    [
        pytest.param([64, 64], 255, [], id="128 * 255 = 32640 fits"),
        pytest.param([65, 64], 255, [[0, 0]], id="129 * 255 = 32895 does not"),
        pytest.param([-64, -64], 255, [], id="-128 * 255 fits"),
        pytest.param([-65, -64], 255, [[0, 0]], id="-129 * 255 does not"),
        pytest.param([127, -128], 255, [], id="two signs cancel"),
        pytest.param([0, 127, 127, 0], 255, [], id="neighbours of two pairs"),
        pytest.param([0, 0, 127], 255, [], id="the odd last one"),
        pytest.param([127, 127], 129, [], id="254 * 129 = 32766 fits"),
        pytest.param([127, 127], 130, [[0, 0]], id="254 * 130 does not"),
        pytest.param([-128, -128], 128, [], id="-32768 fits"),
        pytest.param([-128, -128], 129, [[0, 0]], id="-33024 does not"),
        pytest.param([127, 127], 0, [], id="all codes 0"),
    ],
)
def test_which_pairs_can_leave_16_bits(weights: list[int], top: int, pairs: list[list[int]]) -> None:
    assert hazardous_pairs(torch.tensor([weights], dtype=torch.int8), top).tolist() == pairs


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s"])
def test_weights_of_7_bits_cannot_saturate(mode: str) -> None:
    assert 2 * 64 * 255 == 32640 < 2**15
    layer, shape = LAYERS["3x3"]
    set_weight(layer, np.random.default_rng(0))
    for act in ACTIVATIONS.values():
        lowered = lowered_layer(layer, torch.ones(shape), WeightPlan(QuantSpec.of_mode(mode, 7, 0)), act)
        assert pairs_at_risk(lowered) == {"layer": 0}
        assert isinstance(emulated(lowered).get_submodule("layer"), ExactWeighted)


@pytest.mark.parametrize(
    ("layer", "weight", "act", "output"),
    [
        pytest.param(
            nn.Conv2d(8, 8, 3),
            WeightPlan(QuantSpec.of_mode("asym_u", 8)),
            TensorPlan(QuantSpec.of_mode("sym", 8), min=-1, max=1),
            None,
            id="u8 w",
        ),
        pytest.param(
            nn.Conv2d(8, 8, 3),
            WEIGHTS["sym"],
            TensorPlan(QuantSpec.of_mode("sym", 16), min=-1, max=1),
            None,
            id="16-bit input",
        ),
        pytest.param(
            nn.Conv2d(8, 8, 3),
            WEIGHTS["sym"],
            ACTIVATIONS["signed"],
            TensorPlan(QuantSpec.of_mode("sym", 16), min=-1, max=1),
            id="output",
        ),
        pytest.param(
            nn.Conv2d(8, 8, 3),
            WeightPlan(QuantSpec.of_mode("sym", 16)),
            ACTIVATIONS["signed"],
            None,
            id="16-bit weights",
        ),
        pytest.param(nn.ConvTranspose2d(8, 8, 3), WEIGHTS["sym"], ACTIVATIONS["signed"], None, id="transposed"),
        pytest.param(nn.Conv2d(8, 8, 3, groups=8), WEIGHTS["sym"], ACTIVATIONS["signed"], None, id="depthwise"),
    ],
)
def test_layers_that_saturate_nowhere_are_left_out(
    layer: nn.Module, weight: WeightPlan, act: TensorPlan, output: TensorPlan | None
) -> None:
    set_weight(layer, np.random.default_rng(0))
    assert pairs_at_risk(lowered_layer(layer, torch.ones(1, 8, 5, 5), weight, act, output)) == {}


def two_layers() -> tuple[fx.GraphModule, Tensor]:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    set_weight(model[0], rng)
    nn.init.constant_(model[3].weight, 0.005)
    model[3].weight.data[:, 0] = 1.0  # one large weight: the others have small codes
    images = torch.rand(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    grid = TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=1.0)
    conv = LayerPlan("conv", (grid,), WEIGHTS["sym"], TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=30.0))
    linear = LayerPlan(
        "linear", (None,), WEIGHTS["sym"], TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-40.0, max=40.0)
    )
    plan = Plan({"0": conv, "1": LayerPlan("relu", (None,)), "3": linear})
    return lower(capture(model, images), plan), images


@torch.inference_mode()
def test_rates_count_each_layer_over_all_batches() -> None:
    lowered, images = two_layers()
    before = lowered(images)
    rates = saturation_rates(lowered, images.split(3))
    assert list(rates) == list(pairs_at_risk(lowered)) == ["0", "3"]
    assert rates == saturation_rates(lowered, [images])
    assert rates["0"].outputs == 8 * 6 * 4 * 4
    assert 0 < rates["0"].share < 1
    assert rates["3"] == SaturationRate(0, 0, 0)
    assert not rates["3"].possible
    assert rates["3"].share == 0.0
    assert torch.equal(lowered(images), before)
    assert not torch.equal(emulated(lowered)(images), before)


def test_an_emulated_model_shares_the_integers_of_the_exact_one() -> None:
    lowered, _ = two_layers()
    model = emulated(lowered)
    saturating = model.get_submodule("0")
    assert isinstance(saturating, SaturatingWeighted)
    assert saturating.exact is lowered.get_submodule("0")
    assert model.get_submodule("3") is lowered.get_submodule("3")


def test_the_plan_with_a_reduced_range() -> None:
    layers = {
        "sym": LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 8, 0))),
        "other": LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("asym_s", 8))),
        "unsigned": LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("asym_u", 8))),
        "narrow": LayerPlan("linear", weight=WeightPlan(QuantSpec.of_mode("sym", 4))),
        "float": LayerPlan("linear"),
    }
    reduced = reduce_range(Plan(layers), ["sym", "unsigned", "narrow", "float"])
    assert reduced.layers == {**layers, "sym": LayerPlan("conv", weight=WeightPlan(QuantSpec.of_mode("sym", 7, 0)))}
    assert list(reduced.layers) == list(layers)
    assert reduce_range(Plan(layers, dynamic=True), []) == Plan(layers, dynamic=True)
    with pytest.raises(AssertionError, match="absent"):
        reduce_range(Plan(layers), ["absent"])
