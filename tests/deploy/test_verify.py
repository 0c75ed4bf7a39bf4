"""Verification: the exact model and ONNX Runtime compute the same codes, and where they do not, it says so."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deployed import IMAGES, exported
from torch import fx

from qlib.deploy.verify import Checked, Verification, table, verify, write_verification
from qlib.errors import OutputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SYM_4 = {"mode_activations": "sym", "mode_weights": "asym_u", "bits_activations": 4, "bits_weights": 4}
RESTRICTED_6 = {
    "mode_activations": "sym_restr",
    "mode_weights": "sym_restr",
    "bits_activations": 6,
    "bits_weights": 6,
    "per_channel_wts": False,
}
OWN_5 = {"input_overrides": {0: {"bits_activations": 5}}}
SIGNED = {"mode_activations": "asym_s", "mode_weights": "asym_s"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions, asym_u": ("convolutions", {}),
    "convolutions, sym_restr, 6 bits": ("convolutions", RESTRICTED_6),
    "branches, asym_u": ("branches", {}),
    "branches, asym_s": ("branches", SIGNED),
    "branches, sym, 4 bits": ("branches", SYM_4),
    "attention, asym_u": ("attention", {}),
    "attention, sym": ("attention", {"mode_activations": "sym", "per_channel_wts": False}),
    "softmax over other axes, and over one element": ("axes", {}),
    "numbers times what is added": ("factors", {}),
    "floats, asym_u": ("floats", {}),
    "convolutions, own grids of inputs": ("convolutions", OWN_5),
    "branches, own grids of inputs": ("branches", OWN_5),
    "branches, own grids of inputs, of the same bits": ("branches", {"input_overrides": {0: {"clip_acts": "avg"}}}),
    "attention, own grids of inputs": ("attention", OWN_5),
}


@pytest.mark.parametrize(("net", "settings"), CASES.values(), ids=CASES)
def test_every_layer_is_exact(net: str, settings: dict[str, Any], tmp_path: Path) -> None:
    exact, _, path = exported(net, tmp_path, **settings)
    found = verify(exact, path, IMAGES.split(5))
    assert found.exact, table(found)
    assert found.images == len(IMAGES)
    assert [layer.layer for layer in found.layers if layer.integer and layer.differing] == []
    assert all(layer.codes % len(IMAGES) == 0 and layer.codes > 0 for layer in found.layers)
    if found.first is None:
        assert (found.agreeing, found.logit_difference) == (len(IMAGES), 0)


def test_a_second_grid_is_computed_in_integers(tmp_path: Path) -> None:
    exact, _, path = exported("convolutions", tmp_path, **OWN_5)
    integer = {layer.layer: layer.integer for layer in verify(exact, path, [IMAGES]).layers}
    assert len(second := [name for name in integer if name.startswith("quantize_") and name != "quantize_x"]) > 4
    assert all(integer[name] for name in second), "a code that differs there is not rounding of a float layer"


def test_products_of_16_bits_are_not_cut_at_32(tmp_path: Path) -> None:
    """ONNX Runtime computes them in float; the sums of this net go beyond 2^31."""
    exact, _, path = exported("attention", tmp_path, opset=21, bits_activations=16)
    (product,) = (layer for layer in verify(exact, path, [IMAGES]).layers if layer.layer == "matmul")
    assert product.kernel == "MatMul"
    assert product.differing <= 0.01 * product.codes


def test_float_layers_are_counted_apart(tmp_path: Path) -> None:
    exact, _, path = exported("floats", tmp_path)
    found = verify(exact, path, [IMAGES])
    kinds = {layer.layer: layer.integer for layer in found.layers}
    assert kinds == {
        "quantize_x": True,
        "a": True,
        "leaky_relu": True,
        "deconv": False,
        "hardswish": False,
        "b": True,
        "silu": False,
        "mul": False,
        "(logits)": True,
    }


def test_wide_codes_are_compared(tmp_path: Path) -> None:
    exact, _, path = exported("floats", tmp_path, opset=21, bits_activations=16)
    *layers, logits = verify(exact, path, [IMAGES]).layers
    assert all(layer.codes and layer.largest <= 1 and layer.share < 5e-3 for layer in layers)
    assert [layer.layer for layer in layers if layer.integer] == ["quantize_x"]
    assert logits.codes


def _change_weight(exact: fx.GraphModule) -> None:
    layer: Any = exact.get_submodule("strided")
    layer.weight_codes[0, 0, 0, 0] += 40
    layer.prepare()


def _change_bias(exact: fx.GraphModule) -> None:
    layer: Any = exact.get_submodule("fc")
    layer.bias_codes += 200
    layer.prepare()


def _change_scale(exact: fx.GraphModule) -> None:
    layer: Any = exact.get_submodule("depthwise")
    layer.factor *= 1.01


def _change_pool(exact: fx.GraphModule) -> None:
    pool: Any = exact.get_submodule("avg_pool2d")
    pool.scale *= 1.01


def _change_first(exact: fx.GraphModule) -> None:
    step: Any = exact.get_submodule("quantize_x")
    step.grid.scale *= 1.001


def _change_logits(exact: fx.GraphModule) -> None:
    step: Any = exact.get_submodule("dequantize_fc")
    step.scale *= 1.0001


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> tuple[fx.GraphModule, Path]:
    exact, _, path = exported("convolutions", tmp_path_factory.mktemp("convolutions"))
    return exact, path


CHANGES: dict[str, tuple[Callable[[fx.GraphModule], None], str]] = {
    "one weight": (_change_weight, "strided"),
    "bias": (_change_bias, "fc"),
    "output scale": (_change_scale, "depthwise"),
    "scale of a pool": (_change_pool, "avg_pool2d"),
    "input scale": (_change_first, "quantize_x"),
    "scale of the logits": (_change_logits, "(logits)"),
}


@pytest.mark.parametrize(("change", "layer"), CHANGES.values(), ids=CHANGES)
def test_what_differs_is_named(
    change: Callable[[fx.GraphModule], None], layer: str, convolutions: tuple[fx.GraphModule, Path]
) -> None:
    exact, path = copy.deepcopy(convolutions[0]), convolutions[1]
    assert verify(exact, path, [IMAGES]).exact
    change(exact)
    found = verify(exact, path, [IMAGES])
    assert not found.exact
    assert found.first == layer
    assert [each.layer for each in found.layers if each.verdict != "exact"] == [layer]  # others were given right codes
    assert found.logit_difference > 0
    assert f"first layer that differs: {layer}" in table(found)
    assert table(found).endswith("verification: NOT exact")


def test_a_float_layer_that_is_far_off_differs(tmp_path: Path) -> None:
    exact, _, path = exported("attention", tmp_path)
    layer: Any = exact.get_submodule("ln")
    layer.module.weight.data *= 1.02
    found = verify(exact, path, [IMAGES])
    assert not found.exact
    assert [each.layer for each in found.layers if each.verdict != "exact"] == ["ln"]


def test_logits_in_float_are_compared(tmp_path: Path) -> None:
    exact, _, path = exported("convolutions", tmp_path, without=("fc",))
    logits = verify(exact, path, [IMAGES]).layers[-1]
    assert (logits.layer, logits.integer, logits.verdict) == ("(logits)", False, "exact")
    layer: Any = exact.get_submodule("fc")
    layer.module.bias.data[0] += 0.1
    found = verify(exact, path, [IMAGES])
    assert (found.exact, found.first) == (False, "(logits)")


def test_a_file_without_a_layer_is_not_verified(convolutions: tuple[fx.GraphModule, Path], tmp_path: Path) -> None:
    model = onnx.load(convolutions[1])
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "dilated/codes" else name for name in names]
    onnx.save(model, tmp_path / "renamed.onnx")
    found = verify(convolutions[0], tmp_path / "renamed.onnx", [IMAGES])
    assert not found.exact
    assert {each.layer: each.verdict for each in found.layers if each.verdict != "exact"} == {"dilated": "not verified"}


def test_no_images_verify_nothing(convolutions: tuple[fx.GraphModule, Path]) -> None:
    assert not verify(*convolutions, []).exact


def row(**changes: Any) -> Checked:
    values = {"layer": "a", "kernel": "Gelu", "integer": False, "codes": 5000, "differing": 0, "largest": 0}
    return Checked(**{**values, "differing_alone": 0, **changes})


@pytest.mark.parametrize(
    ("checked", "verdict"),
    [
        (row(), "exact"),
        (row(differing=5, largest=1), "within a step"),
        (row(differing=6, largest=1), "differs"),
        (row(differing=1, largest=2), "differs"),
        (row(differing=1, largest=1, integer=True), "differs"),
        (row(codes=0), "not verified"),
        (row(same_kernel=False), "not verified"),
    ],
)
def test_verdicts(checked: Checked, verdict: str) -> None:
    assert checked.verdict == verdict
    whole = Verification((checked,), 1, 1, 0.0, True)
    assert whole.exact == (verdict in ("exact", "within a step"))


def test_another_model_that_was_looked_into_proves_nothing() -> None:
    found = Verification((row(),), 1, 1, 0.0, faithful=False)
    assert not found.exact
    assert "gives other logits than the one that ships" in table(found)


def test_report(tmp_path: Path) -> None:
    layers = (row(layer="conv", kernel="QLinearConv", integer=True), row(differing=5, largest=1, differing_alone=7))
    found = Verification(layers, 64, 63, 0.125, True)
    assert table(found) == (
        "+---------+-------------+---------+---------+-------------+----------+-----------+---------------+\n"
        "| Layer   | Kernel      | Type    |   Codes |   Differing |    Share |   Largest | Verdict       |\n"
        "|---------+-------------+---------+---------+-------------+----------+-----------+---------------|\n"
        "| conv    | QLinearConv | integer |    5000 |           0 |        0 |         0 | exact         |\n"
        "| a       | Gelu        | float   |    5000 |           5 | 1.00e-03 |         1 | within a step |\n"
        "+---------+-------------+---------+---------+-------------+----------+-----------+---------------+\n"
        "integer layers: 0 of 5,000 codes differ in 1 tensors\n"
        "float layers: 5 of 5,000 codes differ in 1 tensors\n"
        "first layer that differs: a\n"
        "predictions: 63 of 64 agree, largest logit difference 0.125\n"
        "verification: exact"
    )
    write_verification(tmp_path / "verify.csv", found)
    with (tmp_path / "verify.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "layer": "a",
        "kernel": "Gelu",
        "type": "float",
        "codes": "5000",
        "differing": "5",
        "share": "1.00e-03",
        "largest": "1",
        "verdict": "within a step",
    }
    with pytest.raises(OutputError, match=r"cannot write table '.*no/verify\.csv' \(No such file or directory\); give"):
        write_verification(tmp_path / "no/verify.csv", found)


def test_model_and_folder_are_left_as_they_were(convolutions: tuple[fx.GraphModule, Path]) -> None:
    exact, path = convolutions
    before = {key: value.clone() for key, value in exact.state_dict().items()}
    verify(exact, path, [IMAGES])
    assert all(torch.equal(value, before[key]) for key, value in exact.state_dict().items())
    assert [each.name for each in path.parent.iterdir()] == ["convolutions.onnx"]
