"""A few models of each shape through the whole path; `benchmarks/zoo.py` takes all of them, at their full size."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import whole_path
from rows import append_row, read_rows
from whole_path import Row, check, relative_error
from zoo import write_table

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph, capture
from qlib.graph.ir import layers, name_of
from qlib.lower import lower
from qlib.lower.ops.float_op import FloatOp
from qlib.models import create_model, find_model
from qlib.ptq.planner import plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

vit = partial(
    models.VisionTransformer, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
)
swin = partial(models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)
swin_v2 = partial(
    swin,
    block=models.swin_transformer.SwinTransformerBlockV2,
    downsample_layer=models.swin_transformer.PatchMergingV2,
)
inception = partial(models.googlenet, weights=None, aux_logits=False, init_weights=False, transform_input=True)
densenet = partial(models.DenseNet, growth_rate=8, block_config=(2, 3, 3, 2), num_init_features=16)


@pytest.mark.parametrize(
    ("make", "side", "in_float"),
    [
        pytest.param(models.shufflenet_v2_x0_5, 64, set(), id="channel shuffle, concat: shufflenet"),
        pytest.param(models.squeezenet1_1, 64, set(), id="concat, no batch-norm: squeezenet"),
        pytest.param(models.mnasnet0_5, 64, set(), id="depthwise, global mean: mnasnet"),
        pytest.param(models.mobilenet_v3_small, 64, {"Hardswish", "Hardsigmoid"}, id="gates: mobilenet_v3"),
        pytest.param(models.regnet_y_400mf, 64, {"Sigmoid"}, id="grouped, gates: regnet_y"),
        pytest.param(densenet, 64, set(), id="batch-norm after concat: densenet"),
        pytest.param(models.efficientnet_b0, 64, {"SiLU", "Sigmoid"}, id="SiLU: efficientnet"),
        pytest.param(inception, 64, {"mul", "add"}, id="average pools, input transform: googlenet"),
        pytest.param(partial(vit, 64), 64, {"LayerNorm", "GELU"}, id="attention: vit"),
        pytest.param(swin, 40, {"LayerNorm", "GELU", "MaskedSoftmax"}, id="shifted, padded windows: swin"),
        pytest.param(swin_v2, 64, {"LayerNorm", "GELU", "MaskedSoftmax", "normalize"}, id="cosine attention: swin_v2"),
    ],
)
def test_whole_path(make: Callable[[], nn.Module], side: int, in_float: set[str]) -> None:
    torch.manual_seed(0)
    exports = side == 40 or make is densenet  # an export takes most of the time: other tests have more of them
    row = check("a_model", make, torch.randn(4, 3, side, side), export=exports)
    assert row.problems == ""
    assert (row.codes > 0) == exports
    assert row.differing == 0
    assert {kind.rpartition(" ")[0] for kind in row.float_kinds.split(", ") if kind} == in_float
    assert row.captured_error < 1e-4
    assert row.folded_error < 1e-4
    assert row.sqnr_db > 6
    assert row.layers > row.float_layers
    assert row.int8_mb < row.fp32_mb


class Plain(nn.Module):
    """One convolution and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean([2, 3])


class AcrossImages(Plain):
    """What it says of an image depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.amax(0, keepdim=True))


def scale_weights(graph: Graph) -> dict[str, str]:
    graph.conv.weight.data.mul_(1.01)
    return {}


@pytest.mark.parametrize(
    ("make", "broken_steps", "problems"),
    [
        pytest.param(
            Plain, {"fold_batch_norm": scale_weights}, "folded graph differs (by 6e-03 in float64)", id="folding"
        ),
        pytest.param(
            Plain,
            {"restore_quantized": lambda _, header, graph, source: lower(graph, header.plan)},
            "reloaded model differs",
            id="reloading",
        ),
        pytest.param(
            AcrossImages,
            {},
            "captured graph differs; folded graph differs (by 0e+00 in float64); logits depend on the batch",
            id="batches",  # the graphs see two images, the model four
        ),
    ],
)
def test_problems_are_noticed(
    monkeypatch: pytest.MonkeyPatch, make: type[nn.Module], broken_steps: dict[str, object], problems: str
) -> None:
    torch.manual_seed(0)
    for step, broken in broken_steps.items():
        monkeypatch.setattr(whole_path, step, broken)
    assert check("broken", make, torch.randn(4, 3, 8, 8)).problems == problems


@pytest.mark.parametrize(
    ("settings", "in_float"),
    [
        pytest.param(LayerSettings(mode_activations="asym_u"), False, id="8 bits asym_u"),
        pytest.param(LayerSettings(mode_activations="sym"), False, id="signed"),
        pytest.param(LayerSettings(mode_activations="asym_u", bits_activations=6), False, id="6 bits"),
        pytest.param(LayerSettings(mode_activations="asym_u", bits_activations=16), True, id="16 bits"),
    ],
)
def test_a_softmax_in_float_has_its_reason(settings: LayerSettings, in_float: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    graph = capture(vit(32), images)
    collector = Collector(graph)
    collector.update(images)
    plan = plan_post_train_linear(
        graph, {name_of(node): settings for node, _ in layers(graph)}, ModelStats(collector.result())
    )
    name = "encoder.layers.encoder_layer_0.self_attention.softmax"
    assert isinstance(lower(graph, plan).get_submodule(name), FloatOp) == in_float
    reason = "computed in float between integer tensors: the integer form is that of at most 8 bits"
    assert plan.layers[name].note.startswith(reason) == in_float


@pytest.mark.parametrize(
    ("arch", "side"), [pytest.param("vit_h_14", 518, id="fine-tuned at a larger size"), pytest.param("vit_b_32", 224)]
)
def test_vision_transformers_are_built_for_the_size_of_their_images(arch: str, side: int) -> None:
    spec = find_model(arch)
    with torch.device("meta"):
        model = create_model(spec)
    assert spec.input_shape == (3, side, side)
    assert model.image_size == side


def test_relative_error_is_relative_to_the_largest() -> None:
    assert relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25


def test_results_go_on_where_they_stood(tmp_path: Path) -> None:
    numbers = (1e-7, 2e-7, 30.5, 4.0, 1.0, 2.0, 0.5, 0.9, 2_000_000, 0, 500_000, 7, 1e-5, 1.1, 3.0, 40.0, 8.0)
    names = [field.name for field in dataclasses.fields(Row) if field.name != "problems"]
    good = Row(**dict(zip(names, ("a", 224, 3, 1, "GELU 1", *numbers), strict=True)))
    rows = [good, Row("b", problems="broke, somehow")]
    for row in rows:
        append_row(tmp_path / "zoo.csv", row)
    back = read_rows(tmp_path / "zoo.csv", Row(""))
    assert back["a"] == rows[0]
    assert back["b"].problems == "broke, somehow"
    assert math.isnan(back["b"].sqnr_db)
    write_table(tmp_path / "zoo.md", back.values(), 80)
    text = (tmp_path / "zoo.md").read_text(encoding="utf-8")
    assert "1 of 2 models pass (80 in all)" in text
    assert "| a       | 224" in text
    assert "1: GELU 1" in text
    for cell in ("90.0", "0 of 2.0 M", "7 of 0.5 M", "4.0 / 1.1", "40 / 8"):
        assert f" {cell} " in text
