"""Placement: which kernel runs each layer, and why one runs in float."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from deployed import IMAGES, exported, lowered

from qlib.deploy.kernels import Kernels, exact_layers, kernels_of, layer_of, open_with_graph
from qlib.deploy.placement import Placed, int8_share, placement, placement_table, write_placement_csv
from qlib.deploy.session import open_session
from qlib.errors import OutputError
from qlib.lower.saturation import SaturationRate

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KERNELS: dict[str, dict[str, str]] = {
    "convolutions": {
        "grouped": "QLinearConv",
        "depthwise": "QLinearConv",
        "dilated": "QLinearConv",
        "pointwise": "QLinearConv",
        "add": "QLinearAdd",
        "max_pool2d": "NhwcMaxPool",
        "strided": "QLinearConv",
        "avg_pool2d": "QLinearAveragePool",
        "adaptive_avg_pool2d": "QLinearGlobalAveragePool",
        "fc": "QGemm",
    },
    "branches": {
        "a": "QLinearConv",
        "relu": "Max, Min",
        "cat": "DequantizeLinear, QuantizeLinear",
        "b": "QLinearConv",
        "max_pool2d": "NhwcMaxPool",
        "cat_1": "QLinearConcat",
        "c": "QLinearConv",
        "relu_1": "Max, Min",
        "relu_2": "",
        "norm": "QLinearConv",
        "add": "QLinearAdd",
        "add_1": "QLinearAdd",
        "mean": "QLinearGlobalAveragePool",
        "down": "QLinearConv",
        "up": "QLinearConv",
        "sigmoid": "QLinearSigmoid",
        "mul": "QLinearMul",
        "fc": "QGemm",
    },
    "attention": {
        "ln": "LayerNormalization",
        "q": "QGemm",
        "k": "QGemm",
        "matmul": "QLinearMatMul",
        "softmax": "QLinearSoftmax",
        "v": "QGemm",
        "matmul_1": "QLinearMatMul",
        "out": "QGemm",
        "add": "QLinearAdd",
        "mlp": "QGemm",
        "gelu": "Gelu",
        "fc": "QGemm",
    },
    "floats": {
        "a": "QLinearConv",
        "leaky_relu": "QLinearLeakyRelu",
        "deconv": "ConvTranspose",
        "hardswish": "HardSigmoid, Mul",
        "b": "QLinearConv",
        "silu": "Sigmoid, Mul",
        "mul": "Mul",
    },
}

WHY = {
    "ln": "ONNX Runtime has no integer kernel for LayerNormalization",
    "gelu": "ONNX Runtime has no integer kernel for Gelu",
    "deconv": "ONNX Runtime has no integer kernel for ConvTranspose",
    "hardswish": "ONNX Runtime has no integer kernel for HardSwish",
    "silu": "Sigmoid, Mul without quantize steps between them",
    "mul": "an operand is a float constant",
}


@pytest.mark.parametrize("net", KERNELS)
def test_kernels(net: str, tmp_path: Path) -> None:
    exact, macs, path = exported(net, tmp_path)
    placed = placement(path, exact, macs)
    assert {each.layer: each.kernels for each in placed} == KERNELS[net]
    for each in placed:
        assert each.integer == (each.layer not in WHY or net == "branches")
        assert each.why == ("" if each.integer else WHY[each.layer]) or not each.kernels
        assert each.macs == macs.get(each.layer, 0)
    total = sum(macs.values())
    assert int8_share(placed) == (1.0 if net != "floats" else 1 - macs["deconv"] / total)
    assert total == sum(each.macs for each in placed) > 0


def test_another_precision_of_products_runs_the_same_kernels(tmp_path: Path) -> None:
    exact, _, path = exported("branches", tmp_path)
    names = [str(node.target) for node, _ in exact_layers(exact)]
    found = {}
    for precise in (False, True):
        open_session(path, exact=precise, optimized=tmp_path / "optimized.onnx")
        found[precise] = kernels_of(onnx.load(tmp_path / "optimized.onnx").graph, names)
    assert found[False] == found[True] == kernels_of(open_with_graph(path)[1], names)


FLOATS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "16 bits": (
        "floats",
        {"bits_activations": 16, "opset": 21},
        "b",
        "16-bit activations: ONNX Runtime has integer kernels for at most 8",
    ),
    "wide weights": (
        "attention",
        {"bits_weights": 12},
        "mlp",
        "weights stored in 32 bits: ONNX Runtime has integer kernels for 8 only",
    ),
    "input in float": ("branches", {"without": ("sigmoid", "mul")}, "mul", "an input is float"),
    "part of a float kernel": ("convolutions", {"without": ("pointwise", "add")}, "add", "computed by pointwise"),
    "output in float": ("attention", {"without": ("v",)}, "v", "its output is float"),
    "four bits": (
        "floats",
        {"bits_weights": 4, "opset": 21},
        "b",
        "weights stored in 4 bits: ONNX Runtime has integer kernels for 8 only",
    ),
    "all in float": ("attention", {"without": ("mlp", "gelu")}, "gelu", "its inputs and its output are float"),
}


@pytest.mark.parametrize(("net", "settings", "layer", "why"), FLOATS.values(), ids=FLOATS)
def test_why_a_layer_runs_in_float(net: str, settings: dict[str, Any], layer: str, why: str, tmp_path: Path) -> None:
    exact, macs, path = exported(net, tmp_path, **settings)
    found = {each.layer: each for each in placement(path, exact, macs)}[layer]
    assert (found.integer, found.why) == (False, why)


def test_a_float_result_that_others_use(tmp_path: Path) -> None:
    exact, macs, path = exported("floats", tmp_path)
    model = onnx.load(path)
    (conv,) = (node for node in model.graph.node if node.name == "b/Conv")
    model.graph.output.append(onnx.helper.make_tensor_value_info(conv.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    found = {each.layer: each for each in placement(path, exact, macs)}["b"]
    assert (found.kernels, found.integer, found.why) == ("Conv", False, "its float result has several consumers")


def test_a_layer_that_another_kernel_computes(tmp_path: Path) -> None:
    exact, _, path = exported("floats", tmp_path)
    model = onnx.load(path)
    for node in [node for node in model.graph.node if node.name.startswith("leaky_relu/")]:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = ["a/codes" if name == "leaky_relu/codes" else name for name in node.input]
    onnx.save(model, path)
    found = {each.layer: each for each in placement(path, exact, {})}["leaky_relu"]
    assert found == Placed("leaky_relu", "", True, "computed by a", 0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer1.0.conv/Conv_token_3", "layer1.0.conv"),
        ("layer1/DequantizeLinear", "layer1"),
        ("odd/name/Conv", "odd/name"),
        ("layer1.0.convolution/Conv", None),
        ("Reshape_2", None),
        ("", None),
    ],
)
def test_layer_of_a_node(name: str, layer: str | None) -> None:
    assert layer_of(name, frozenset({"layer1", "layer1.0.conv", "odd", "odd/name"})) == layer


def test_names_of_kernels() -> None:
    assert str(Kernels(("HardSigmoid", "Mul", "Mul"))) == "HardSigmoid, Mul"
    assert str(Kernels()) == ""


def test_report(tmp_path: Path) -> None:
    placed = [
        Placed("conv", "QLinearConv", True, "", 1500, SaturationRate(pairs=7, saturated=3, outputs=400)),
        Placed("relu", "", True, "computed by conv", 0),
        Placed("fc", "QGemm", True, "", 0, SaturationRate(pairs=2, saturated=0, outputs=0)),
        Placed("up", "ConvTranspose", False, "ONNX Runtime has no integer kernel for ConvTranspose", 500),
    ]
    table = placement_table(placed).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")] == [
        ["Layer", "Kernel", "Type", "Why", "MACs", "Saturates without VNNI"],
        ["conv", "QLinearConv", "integer", "", "1,500", "0.75 % of sums"],
        ["relu", "", "integer", "computed by conv", "0", "never"],
        ["fc", "QGemm", "integer", "", "0", "can (2 pairs)"],
        ["up", "ConvTranspose", "float", "ONNX Runtime has no integer kernel for ConvTranspose", "500", "never"],
    ]
    assert table[-1] == "75.00% of multiply-accumulates in integers"
    write_placement_csv(tmp_path / "placement.csv", placed)
    with (tmp_path / "placement.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "layer": "relu",
        "kernel": "",
        "type": "integer",
        "why": "computed by conv",
        "macs": "0",
        "pairs_at_risk": "0",
        "saturated": "0.0",
    }
    assert [row["saturated"] for row in rows] == ["0.0075", "0.0", "", "0.0"]
    with pytest.raises(
        OutputError, match=r"cannot write table '.*no/placement\.csv' \(No such file or directory\); give"
    ):
        write_placement_csv(tmp_path / "no/placement.csv", placed)


def test_nothing_to_place() -> None:
    assert int8_share([]) == 1.0


def test_layers_are_those_that_compute() -> None:
    exact, _ = lowered("branches")
    names = [str(node.target) for node, _ in exact_layers(exact)]
    assert set(KERNELS["branches"]) < set(names)
    assert set(names) - set(KERNELS["branches"]) == {"quantize_x", "quantize_offset", "dequantize_fc"}
    assert exact(IMAGES[:1]).shape == (1, 10)
