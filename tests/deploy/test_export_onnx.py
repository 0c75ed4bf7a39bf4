"""The exported file: what it names and stores, what it refuses, and that another process computes the same from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deployed import IMAGES, NETS, Net, conv, exported, lowered
from runs import ROOT
from torch import Tensor, fx, nn

from qlib.deploy import export as export_onnx
from qlib.deploy.export import export_float, export_quantized
from qlib.deploy.session import open_session, run_session
from qlib.deploy.storage import choose_opset, refuse_unexportable, storage_notes
from qlib.errors import ExportError, OutputError
from qlib.graph import capture
from qlib.lower import exact_arithmetic
from qlib.lower.qdq import lower_qdq
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def padding(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu6(m.reflected(x)), 2)
    x = m.circular(m.shared(m.shared(x)))
    return m.fc(F.relu(m.replicated(x)).flatten(1))  # type: ignore[no-any-return]


def large(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.wide(F.relu(m.narrow(x))).mean((2, 3)))  # type: ignore[no-any-return]


NETS["padding"] = (
    padding,
    lambda: {
        "reflected": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "shared": conv(groups=4),
        "circular": nn.Conv2d(8, 4, 3, padding=2, padding_mode="circular"),
        "replicated": nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="replicate", bias=False),
        "fc": nn.Linear(64, 10),
    },
)
NETS["large"] = (large, lambda: {"narrow": conv(8, 96), "wide": conv(96, 96), "fc": nn.Linear(96, 10)})

FOUR = {"mode_activations": "sym", "bits_activations": 4, "bits_weights": 4}
UNSIGNED = {"mode_activations": "asym_s", "mode_weights": "asym_u", "per_channel_wts": False}

FILES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "convolutions": ("convolutions", 20, {}),
    "branches": ("branches", 18, UNSIGNED),
    "padding": ("padding", 20, {}),
    "four": ("padding", 20, FOUR),
    "int4": ("padding", 21, FOUR),
    "uint4": ("padding", 22, {**UNSIGNED, "bits_weights": 4}),
    "uint16": ("padding", 21, {"bits_activations": 12}),
    "wide weights": ("padding", 20, {"bits_weights": 12}),
    "large": ("large", 20, {}),
}

Files = Callable[[str], tuple[fx.GraphModule, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The exact model and the file of a row of `FILES`, exported once."""
    made: dict[str, tuple[fx.GraphModule, Path]] = {}

    def file(name: str) -> tuple[fx.GraphModule, Path]:
        if name not in made:
            net, opset, settings = FILES[name]
            exact, _, path = exported(net, tmp_path_factory.mktemp("onnx"), opset=opset, **settings)
            made[name] = exact, path
        return made[name]

    return file


@pytest.fixture(scope="module")
def in_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    function, modules = NETS["large"]
    path = tmp_path_factory.mktemp("float") / "large.onnx"
    graph = capture(Net(function, modules()).eval(), IMAGES[:2])
    export_float(graph, IMAGES[:2], path, opset=19, metadata={"version": "1.2"})
    return path


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@torch.no_grad()
def logits_of(exact: fx.GraphModule, images: Tensor) -> Tensor:
    with exact_arithmetic():
        logits: Tensor = exact(images)
    return logits


def test_weights_of_almost_nothing_are_written_as_zero(tmp_path: Path) -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), torch.ones(2, 3, 2, 2)
    model[0].weight.data[:] = torch.tensor([1e-31, 1e-29, 1.0])[None, :, None, None]
    model[0].bias.data[:] = torch.tensor([-1e-38, 2.0])
    export_float(capture(model.eval(), images), images, tmp_path / "m.onnx", opset=20, metadata={})
    found = sorted(
        value.flatten().tolist() for value in initializers(tmp_path / "m.onnx").values() if value.ndim in (1, 4)
    )
    assert [0.0, 2.0] in found
    assert pytest.approx([0.0, 1e-29, 1.0] * 2, rel=1e-6, abs=0.0) in found


def test_names_of_the_integer_model(files: Files) -> None:
    graph = onnx.load(files("padding")[1]).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    assert {name for node in graph.node for name in node.output if name.endswith("/codes")} == {
        f"{layer}/codes"
        for layer in ("quantize_x", "reflected", "max_pool2d", "shared", "shared_1", "circular", "replicated", "fc")
    }
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {name for name in names if "Conv" in name or "Gemm" in name} == {
        *(f"{layer}/Conv" for layer in ("reflected", "shared", "shared_1", "circular", "replicated")),
        "fc/Gemm",
    }


def test_names_of_the_float_model(in_float: Path) -> None:
    graph = onnx.load(in_float).graph
    nodes = [(node.name, node.op_type, list(node.output)) for node in graph.node]
    assert [each for each in nodes if each[1] in ("Conv", "Relu", "Gemm")] == [
        ("narrow/Conv", "Conv", ["narrow"]),
        ("relu/Relu", "Relu", ["relu"]),
        ("wide/Conv", "Conv", ["wide"]),
        ("fc/Gemm", "Gemm", ["logits"]),
    ]
    assert [value.name for value in graph.input] == ["images"]


@pytest.mark.parametrize(("name", "opset", "version"), [("float", 19, "1.2"), ("branches", 18, "test")])
def test_metadata(name: str, opset: int, version: str, files: Files, in_float: Path) -> None:
    model = onnx.load(in_float if name == "float" else files(name)[1])
    assert {each.key: each.value for each in model.metadata_props} == {"qlib.version": version}
    assert (model.producer_name, model.producer_version) == ("qlib-compress", version)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)]
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["float", "convolutions", "branches"])
def test_the_file_tells_nothing_of_the_machine(name: str, files: Files, in_float: Path) -> None:
    path = in_float if name == "float" else files(name)[1]
    for text in (str(ROOT), str(path.parent), sys.prefix, "site-packages", ".py", "pkg.torch", "namespace"):
        assert text.encode() not in path.read_bytes(), text


WEIGHT = "reflected.op.weight.values"
STORED: dict[str, tuple[str, str, str]] = {  # types of the weights, the biases and the activations
    "padding": ("int8", "int32", "uint8"),
    "branches": ("uint8", "int32", "uint8"),
    "four": ("int8", "int32", "uint8"),
    "int4": ("int4", "int32", "uint8"),
    "uint4": ("uint4", "int32", "uint8"),
    "uint16": ("int8", "int32", "uint16"),
    "wide weights": ("float32", "int32", "uint8"),
}


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored(name: str, files: Files) -> None:
    exact, path = files(name)
    graph = onnx.load(path).graph
    kinds = {each.name: onnx.helper.tensor_dtype_to_np_dtype(each.data_type).name for each in graph.initializer}
    weights, biases, activations = STORED[name]
    assert {kind for key, kind in kinds.items() if key.endswith("weight.values") and "norm" not in key} == {weights}
    assert {kind for key, kind in kinds.items() if key.endswith("bias.values")} == {biases}
    assert {kinds[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"} == {activations}
    stored = initializers(path)
    for layer, module in exact.named_modules():
        prefix = f"{layer}.op" if f"{layer}.op.weight.values" in stored else f"{layer}.layer.op"
        if f"{prefix}.weight.values" not in stored:
            continue
        codes: Any = module.weight_codes
        weight, scale = stored[f"{prefix}.weight.values"], module.weight_scale
        if name == "wide weights":
            assert np.array_equal(weight, (codes * scale.view(-1, *[1] * (codes.ndim - 1))).numpy())
        else:
            assert np.array_equal(weight.astype(np.int32), codes.numpy())
        if module.bias_codes is not None:
            assert np.array_equal(stored[f"{prefix}.bias.values"], module.bias_codes.numpy())


@pytest.mark.parametrize("name", ["padding", "branches"])
def test_the_scale_of_a_bias_is_that_of_input_and_weight(name: str, files: Files) -> None:
    path = files(name)[1]
    stored, checked = initializers(path), 0
    steps = {node.output[0]: node for node in onnx.load(path).graph.node if node.op_type == "DequantizeLinear"}
    for node in onnx.load(path).graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[2] in steps:
            x, weight, bias = (stored[steps[name].input[1]] for name in node.input)
            assert np.array_equal(bias, x * weight)
            assert bias.dtype == np.float32
            checked += 1
    assert checked >= 4


def test_codes_of_few_bits_are_kept_in_their_bounds(files: Files) -> None:
    _, path = files("four")
    stored = initializers(path)
    assert int(stored[WEIGHT].min()) >= -8
    assert int(stored[WEIGHT].max()) <= 7
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info("reflected/codes", onnx.TensorProto.UINT8, None))
    (codes,) = run_session(open_session(model.SerializeToString()), IMAGES, ["reflected/codes"])
    assert int(codes.min()) >= 8  # zero is 8, as the grid is signed, and the layer ends in ReLU6
    assert int(codes.max()) <= 15


@pytest.mark.parametrize("name", ["padding", "branches", "uint4"])
def test_no_two_weights_share_a_zero_point(name: str, files: Files) -> None:
    graph = onnx.load(files(name)[1]).graph
    stored = {tensor.name for tensor in graph.initializer}
    used = [name for node in graph.node for name in node.input if name]
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            assert used.count(node.input[2]) == 1, node.name


EXACT = ("convolutions", "branches", "padding", "four")


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", EXACT)
def test_any_batch_gives_the_logits_of_the_exact_model(name: str, count: int, files: Files) -> None:
    exact, path = files(name)
    (logits,) = run_session(open_session(path), IMAGES[:count])
    assert torch.equal(logits, logits_of(exact, IMAGES[:count]))


@pytest.mark.parametrize("name", ["int4", "uint4", "uint16", "wide weights", "large"])
def test_files_of_other_types_run(name: str, files: Files) -> None:
    exact, path = files(name)
    (logits,) = run_session(open_session(path), IMAGES)
    expected = logits_of(exact, IMAGES)
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(0.02 * expected.abs().max()))


ELSEWHERE = """
import sys
import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
for number, path in enumerate(sys.argv[2:]):
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = np.load(f"{sys.argv[1]}/{number}.npz")
    (logits,) = session.run(None, {"images": given["images"]})
    assert np.array_equal(logits.view(np.int32), given["logits"].view(np.int32)), path
assert "torch" not in sys.modules and "qlib" not in sys.modules
print(number + 1, "files")
"""


def test_another_process_without_torch_computes_the_same_bits(files: Files, tmp_path: Path) -> None:
    paths = []
    for number, name in enumerate(EXACT):
        exact, path = files(name)
        np.savez(tmp_path / f"{number}.npz", images=IMAGES.numpy(), logits=logits_of(exact, IMAGES).numpy())
        paths.append(str(path))
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(EXACT)} files\n", "")


@pytest.mark.parametrize("name", [*EXACT, "uint16", "wide weights"])
@torch.no_grad()
def test_the_exported_graph_in_torch_is_close_to_the_exact_one(name: str, files: Files) -> None:
    exact, _ = files(name)
    logits, expected = lower_qdq(exact)(IMAGES), logits_of(exact, IMAGES)
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(0.02 * expected.abs().max()))


def test_a_quarter_of_the_size(files: Files, in_float: Path) -> None:
    ratio = files("large")[1].stat().st_size / in_float.stat().st_size
    assert 0.25 < ratio < 0.29


def test_large_weights_stand_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    monkeypatch.setattr(export_onnx, "_EXTERNAL", 1000)
    exact, path = files("large")
    beside = tmp_path / "beside.onnx"
    export_quantized(exact, IMAGES[:2], beside, opset=20, metadata={})
    assert {each.name for each in tmp_path.iterdir()} == {"beside.onnx", "beside.onnx.data"}
    assert beside.stat().st_size < path.stat().st_size / 4
    (logits,) = run_session(open_session(beside), IMAGES)
    assert torch.equal(logits, run_session(open_session(path), IMAGES)[0])


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    graph = capture(nn.Flatten(), IMAGES[:2])
    (tmp_path / "taken.onnx").mkdir()
    for name, reason in (("no/such.onnx", "No such file or directory"), ("taken.onnx", "Is a directory")):
        path = tmp_path / name
        with pytest.raises(OutputError) as error:
            export_float(graph, IMAGES[:2], path, opset=20, metadata={})
        assert (
            str(error.value) == f"cannot write ONNX model {str(path)!r} ({reason}); give a folder that can be written"
        )
    assert [each.name for each in tmp_path.iterdir()] == ["taken.onnx"]


def layer(weight: int = 0, output: int = 8, **more: Any) -> LayerPlan:
    return LayerPlan(
        "conv",
        weight=WeightPlan(QuantSpec.of_mode("sym", weight)) if weight else None,
        output=TensorPlan(QuantSpec.of_mode("sym", output), min=-1.0, max=1.0) if output else None,
        **more,
    )


OPSETS: dict[str, tuple[Plan | None, int | None, int | str]] = {
    "float": (None, None, 20),
    "float, asked for": (None, 18, 18),
    "8 bits": (Plan({"a": layer(8)}), None, 20),
    "8 bits, asked for": (Plan({"a": layer(8)}), 23, 23),
    "4-bit weights": (Plan({"a": layer(4)}), None, 20),
    "wide output": (Plan({"a": layer(8), "b": layer(8, 9)}), None, 21),
    "wide input": (
        Plan({"a": LayerPlan("add", inputs=(None, TensorPlan(QuantSpec.of_mode("sym", 16), min=0.0, max=1.0)))}),
        None,
        21,
    ),
    "wide, asked for": (Plan({"a": layer(8, 16)}), 22, 22),
    "too old": (
        Plan({"a": layer(8), "b": layer(8, 12)}),
        20,
        "--export-opset 20 has no 16-bit activations, which layer 'b' has; use --export-opset 21, or --qe-bits-acts 8",
    ),
}


@pytest.mark.parametrize(("plan", "wanted", "expected"), OPSETS.values(), ids=OPSETS)
def test_opset(plan: Plan | None, wanted: int | None, expected: int | str) -> None:
    if isinstance(expected, int):
        assert choose_opset(plan, wanted) == expected
    else:
        with pytest.raises(ExportError) as error:
            choose_opset(plan, wanted)
        assert str(error.value) == expected


NOTES: dict[str, tuple[dict[str, LayerPlan], int, list[str]]] = {
    "8 bits": ({"a": layer(8), "b": layer(0, 0)}, 20, []),
    "few bits": (
        {"a": layer(4), "b": layer(4), "c": layer(7, 6)},
        20,
        [
            "weights of 4 bits are stored as int8 with the same codes: 2 layers (a, b)",
            "weights of 7 bits are stored as int8 with the same codes: 1 layers (c)",
            "activations of 6 bits are stored as uint8 with the same codes: 1 layers (c)",
        ],
    ),
    "int4": (
        {name: layer(4) for name in "abcde"},
        21,
        ["weights of 4 bits are stored as int4, which ONNX Runtime computes in float: 5 layers (a, b, c, ...)"],
    ),
    "many bits": (
        {"a": layer(12), "b": layer(8, 12)},
        21,
        [
            "weights of 12 bits are stored in float32, and computed so: 1 layers (a)",
            "activations of 12 bits are stored as uint16, which ONNX Runtime computes in float: 1 layers (b)",
        ],
    ),
}


@pytest.mark.parametrize(("layers", "opset", "notes"), NOTES.values(), ids=NOTES)
def test_notes_on_what_is_stored_otherwise(layers: dict[str, LayerPlan], opset: int, notes: list[str]) -> None:
    assert list(storage_notes(Plan(layers), opset)) == notes


REFUSED: dict[str, tuple[Plan, str]] = {
    "dynamic": (
        Plan({"a": layer(8)}, dynamic=True),
        "a plan without fixed ranges cannot be exported: collect statistics with --qe-calibration,"
        " and quantize with --qe-stats-file",
    ),
    "approximate factor": (
        Plan({"a": layer(8), "b": layer(8, scale_approx_bits=8), "c": layer(8, scale_approx_bits=8)}),
        "layer 'b' cannot be exported: it requantizes with an approximate factor (--qe-scale-approx-bits),"
        " which no ONNX operator does; drop that",
    ),
    "small accumulator": (
        Plan({"a": layer(8, bits_accum=16)}),
        "layer 'a' cannot be exported: it has an accumulator of 16 bits that can saturate (--qe-bits-accum),"
        " which no ONNX operator does; drop that",
    ),
    "float64": (
        Plan({"a": layer(0, 0, float_bits=64)}),
        "layer 'a' cannot be exported: it runs in float64 (fpq: 64), which no ONNX operator does; drop that",
    ),
}


@pytest.mark.parametrize(("plan", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported(plan: Plan, sentence: str) -> None:
    with pytest.raises(ExportError) as error:
        refuse_unexportable(plan, fx.GraphModule(nn.Module(), fx.Graph()))
    assert str(error.value) == sentence


def test_an_accumulator_that_cannot_saturate_is_no_obstacle() -> None:
    exact, _ = lowered("padding", bits_accum=26)
    layers = {name: layer(8, bits_accum=26) for name in ("reflected", "shared", "fc")}
    refuse_unexportable(Plan(layers), exact)
