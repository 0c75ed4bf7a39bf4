"""The ranges of a plan in the formats of ONNX Runtime, TensorRT and AIMET, and the names of their tensors."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.deploy.encodings import ENCODINGS, Encodings, collect_encodings, encodings_file, write_encodings
from qlib.deploy.export import export_float
from qlib.deploy.named import with_named_tensors
from qlib.errors import ExportError, OutputError, QlibError, StatsError
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.graph.ir import layers, name_of
from qlib.lower import lower
from qlib.ptq.planner import plan_post_train_linear
from qlib.quant.affine import qparams_from_range
from qlib.quant.plan import Plan, TensorPlan
from qlib.quant.spec import QuantSpec
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats


class Net(nn.Module):
    """A ReLU that is used twice, a fused and an unfused one, an addition, moves, and a layer in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.relu = nn.ReLU()
        self.branch = nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.fc = nn.Linear(2 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.branch(x))
        x = self.up(self.pool(x))
        return self.fc(torch.flatten(x, 1))


@dataclass(frozen=True)
class Built:
    graph: Graph
    plan: Plan
    lowered: fx.GraphModule
    images: Tensor

    def collect(self) -> Encodings:
        return collect_encodings(self.graph, self.plan, self.lowered)

    def text(self, kind: str, path: Path) -> str:
        write_encodings(kind, path, self.graph, self.plan, self.lowered)
        return path.read_text()


def build(settings: LayerSettings | None = None, **overrides: LayerSettings) -> Built:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    graph = capture(Net().eval(), images)
    folded = fold_batch_norm(graph)
    collector = Collector(graph)
    collector.update(images)
    default = settings or LayerSettings(mode_activations="asym_u", per_channel_wts=True)
    each = {name_of(node): overrides.get(name_of(node), default) for node, _ in layers(graph)}
    plan = plan_post_train_linear(graph, each, ModelStats(collector.result()), folded)
    return Built(graph, plan, lower(graph, plan), images)


@pytest.fixture(scope="module")
def built() -> Built:
    return build()


NAMES = ["images", "stem.0", "relu", "branch", "add", "relu_1", "pool", "up", "flatten", "logits"]


def test_names_are_those_of_the_tensors(built: Built) -> None:
    encodings = built.collect()
    assert list(encodings.activations) == NAMES
    assert encodings.implied == {"stem.0", "add", "flatten"}
    assert list(encodings.parameters) == ["stem.0.weight", "branch.weight", "up.weight", "fc.weight"]


def test_a_fused_relu_has_the_range_and_a_moved_tensor_that_of_its_source(built: Built) -> None:
    found, plans = built.collect().activations, built.plan.layers
    assert found["relu"] == found["stem.0"] == plans["stem.0"].output
    assert found["pool"] == found["relu_1"] == plans["add"].output
    assert found["flatten"] == plans["up"].output
    assert found["logits"] == plans["fc"].output
    assert found["images"] == plans["stem.0"].inputs[0]


def test_layers_in_float_are_left_out() -> None:
    in_float = LayerSettings(bits_activations=None, bits_weights=None)
    encodings = build(up=in_float).collect()
    assert list(encodings.parameters) == ["stem.0.weight", "branch.weight", "fc.weight"]
    assert set(NAMES) - set(encodings.activations) == set()  # its output is the input of fc, which quantizes it
    encodings = build(up=in_float, fc=in_float).collect()
    assert [name for name in NAMES if name not in encodings.activations] == ["up", "flatten", "logits"]


def test_of_two_grids_of_one_tensor_the_finer_one_is_written() -> None:
    in_float = LayerSettings(bits_activations=None, bits_weights=None)
    finer = LayerSettings(mode_activations="asym_u", bits_activations=6)
    encodings = build(**{"stem.0": in_float, "branch": finer}).collect()
    assert encodings.activations["relu"].spec.bits == 8  # the addition's, not the 6 of the branch


def test_weights_are_those_of_the_lowered_model(built: Built) -> None:
    parameters = built.collect().parameters
    for name in ("stem.0", "up", "fc"):
        codes = built.lowered.get_submodule(name)
        assert torch.equal(parameters[f"{name}.weight"].scale, codes.weight_scale)  # type: ignore[arg-type]
    assert parameters["up.weight"].scale.shape == (2,)  # one for each output channel, also of a transposed layer


GRID = TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-1.0, max=3.0)


def test_ort_text() -> None:
    text = ENCODINGS["ort"](Encodings({"conv": GRID}))[0]
    number = {"dtype": "float32", "CLS": "numpy.array"}
    assert json.loads(text) == {
        "CLS": "TensorsData",
        "data": {"conv": {"lowest": {"data": -1.0, **number}, "highest": {"data": 3.0, **number}, "CLS": "TensorData"}},
        "calibration_method": {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"},
        "smooth_quant": False,
    }


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(-1.0, 3.0, 3 / 127), (-127.0, 0.0, 1.0), (0.0, 0.0, 1.0)],
    ids=["max", "min", "all zero"],
)
def test_tensorrt_text(low: float, high: float, scale: float) -> None:
    grid = TensorPlan(QuantSpec.of_mode("asym_s", 16), min=low, max=high)
    header, line, end = ENCODINGS["tensorrt"](Encodings({"layer1.0.conv": grid}))[0].split("\n")
    assert (header, end) == ("TRT-8601-EntropyCalibration2", "")
    name, digits = line.split(": ")
    assert name == "layer1.0.conv"
    assert struct.unpack(">f", bytes.fromhex(digits))[0] == pytest.approx(scale, rel=1e-7)


@pytest.mark.parametrize(
    ("bits", "mode", "low", "high", "scale", "offset", "symmetric"),
    [
        (8, "asym_u", -2.0, 49.0, 0.2, -10, "False"),
        (8, "asym_s", -2.0, 49.0, 0.2, -10, "False"),
        (8, "sym", -127.5, 10.0, 1.0, -128, "True"),
        (8, "sym_restr", -127.0, 10.0, 1.0, -128, "True"),
        (4, "asym_u", 0.0, 7.5, 0.5, 0, "False"),
        (16, "asym_u", 0.0, 6553.5, 0.1, 0, "False"),
    ],
    ids=["asym_u", "asym_s", "sym", "sym_restr", "4 bits", "16 bits"],
)
def test_aimet_grid(bits: int, mode: str, low: float, high: float, scale: float, offset: int, symmetric: str) -> None:
    text = ENCODINGS["aimet"](Encodings({"conv": TensorPlan(QuantSpec.of_mode(mode, bits), min=low, max=high)}))[0]
    content = json.loads(text)
    assert content["version"] == "0.6.1"
    (found,) = content["activation_encodings"]["conv"]
    first = 1 if mode == "sym_restr" else 0  # the code that a restricted grid does not use
    assert found == {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": symmetric,
        "scale": pytest.approx(scale, rel=1e-6),
        "offset": offset,
        "min": pytest.approx((first + offset) * scale, rel=1e-6),
        "max": pytest.approx((2**bits - 1 + offset) * scale, rel=1e-6),
    }


def test_aimet_has_a_list_of_channels_and_no_implied_tensors() -> None:
    weight = qparams_from_range(torch.tensor([-127.5, -1.0]), torch.tensor([0.0, 1.0]), QuantSpec.of_mode("sym", 8, 0))
    text, count = ENCODINGS["aimet"](
        Encodings({"conv": GRID, "relu": GRID}, {"conv.weight": weight}, frozenset({"conv"}))
    )
    assert count == 2
    content = json.loads(text)
    assert list(content["activation_encodings"]) == ["relu"]
    channels = content["param_encodings"]["conv.weight"]
    assert [channel["scale"] for channel in channels] == pytest.approx([1.0, 1 / 127.5])
    assert [channel["offset"] for channel in channels] == [-128, -128]


def test_counts_and_contents(built: Built, tmp_path: Path) -> None:
    counts = {}
    for kind in ENCODINGS:
        path = tmp_path / encodings_file(kind, "net")
        counts[kind] = write_encodings(kind, path, built.graph, built.plan, built.lowered)
    assert counts == {"ort": 10, "tensorrt": 10, "aimet": 7 + 4}
    assert len((tmp_path / "net_calibration.cache").read_text().splitlines()) == 1 + 10
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["net_calibration_ort.json", "net_calibration.cache", "net_encodings.json"]
    )


def test_mistakes_are_one_sentence(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(kind: str, plan: Plan, path: Path = path) -> None:
        write_encodings(kind, path, built.graph, plan, built.lowered)

    with pytest.raises(QlibError, match="unknown format of encodings 'aimed'; allowed: ort, tensorrt, aimet; did you"):
        write("aimed", built.plan)
    with pytest.raises(StatsError, match=r"^a dynamic plan has no ranges to export for ort: each image has its own"):
        write("ort", replace(built.plan, dynamic=True))
    with pytest.raises(StatsError, match="no range to export for tensorrt: the plan leaves everything in float"):
        write("tensorrt", Plan({}))
    with pytest.raises(OutputError, match=r"^cannot write encodings '.*absent.*' \(No such file"):
        write("ort", built.plan, tmp_path / "absent" / "file")
    assert list(tmp_path.iterdir()) == []


def test_aimet_refuses_fewer_than_four_bits(tmp_path: Path) -> None:
    few = build(branch=LayerSettings(mode_activations="asym_u", bits_weights=3))
    with pytest.raises(ExportError, match=r"^AIMET encodings have 4 bits or more, but 'branch.weight' has 3; give"):
        few.text("aimet", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_named_graph_computes_the_same(built: Built) -> None:
    before = [(node.op, node.target) for node in built.graph.graph.nodes]
    named = with_named_tensors(built.graph)
    assert torch.equal(named(built.images), built.graph(built.images))
    calls = [str(node.target) for node in named.graph.nodes if node.op == "call_module"]
    assert calls == ["stem.0", "relu", "branch", "add", "relu_1", "pool", "up", "flatten", "fc"]
    assert [(node.op, node.target) for node in built.graph.graph.nodes] == before, "the graph itself is as it was"


def test_names_are_in_the_float_file_and_onnxruntime_quantizes_with_them(built: Built, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    model, cache, quantized = (tmp_path / name for name in ("net.onnx", "cache.json", "quantized.onnx"))
    export_float(built.graph, built.images[:2], model, opset=20, metadata={})
    nodes = onnx.load(model).graph.node
    names = {name for node in nodes for name in (*node.input, *node.output)}
    encodings = built.collect()
    assert names >= {*encodings.activations, *encodings.parameters}

    built.text("ort", cache)
    data = quantization.load_tensors_data(cache)
    assert {name: tuple(map(float, each.range_value)) for name, each in data.items()} == {
        name: (grid.min, grid.max) for name, grid in encodings.activations.items()
    }
    quantization.quantize_static(model, quantized, None, calibration_cache_path=cache, per_channel=True)
    grid = encodings.activations["relu"].qparams()
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(quantized).graph.initializer}
    assert stored["relu_scale"] == grid.scale.numpy()
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # else products saturate on some processors
    session = runtime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": built.images.numpy()})
    expected = built.graph(built.images).detach()
    assert float((torch.from_numpy(logits) - expected).abs().max()) < 0.03 * float(expected.abs().max())
