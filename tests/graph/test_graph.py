"""Capture, names, kinds, attention, batch-norm folding and activation fusion."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from qlib.errors import ModelError
from qlib.graph import Graph, capture, fold_batch_norm, fused_activations, kind_of
from qlib.graph.ir import is_move, layer_inputs, layers, name_of, source_of

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A model whose forward is a plain function of (module, images), with some layers to call."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.bias = nn.Parameter(torch.randn(5))
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def described(graph: Graph) -> list[tuple[str, str]]:
    return [(name_of(node), kind_of(module)) for node, module in layers(graph)]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[tuple[str, str]]]] = {
    "x + y": (lambda m, x: m.conv(x) + x, [("conv", "conv"), ("add", "add")]),
    "x += y": (lambda m, x: operator.iadd(m.conv(x), x), [("conv", "conv"), ("add", "add")]),
    "torch.add": (lambda m, x: torch.add(m.conv(x), x), [("conv", "conv"), ("add", "add")]),
    "x.add_(y)": (lambda m, x: m.conv(x).add_(x), [("conv", "conv"), ("add", "add")]),
    "torch.add with alpha": (lambda m, x: torch.add(x, x, alpha=2), [("add", "float_op")]),
    "x + 1": (lambda m, x: x + 1.0, [("add", "float_op")]),
    "two adds": (lambda m, x: x + x + x, [("add", "add"), ("add_1", "add")]),
    "x * y": (lambda m, x: m.conv(x) * x, [("conv", "conv"), ("mul", "mul")]),
    "torch.mul": (lambda m, x: torch.mul(x, x), [("mul", "mul")]),
    "x * parameter": (lambda m, x: x * m.gain, [("mul", "mul")]),
    "x @ y": (lambda m, x: x @ x, [("matmul", "matmul")]),
    "torch.matmul": (lambda m, x: torch.matmul(x, x), [("matmul", "matmul")]),
    "torch.bmm": (lambda m, x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1)), [("matmul", "matmul")]),
    "einsum q k^T": (lambda m, x: torch.einsum("bhid,bhjd->bhij", x, x), [("einsum", "matmul")]),
    "einsum p v": (lambda m, x: torch.einsum("b h i j, b h j d -> b h i d", x, x), [("einsum", "matmul")]),
    "einsum other": (lambda m, x: torch.einsum("bhij,bhij->bhj", x, x), [("matmul", "matmul")]),
    "einsum of a diagonal": (lambda m, x: torch.einsum("bhii,bhij->bhj", x, x), [("einsum", "float_op")]),
    "torch.cat": (lambda m, x: torch.cat([x, m.conv(x)], 1), [("conv", "conv"), ("cat", "concat")]),
    "torch.concat dim=": (lambda m, x: torch.concat((x, x, x), dim=-1), [("concat", "concat")]),
    "F.relu": (lambda m, x: F.relu(x), [("relu", "relu")]),
    "F.relu inplace": (lambda m, x: F.relu(x, inplace=True), [("relu", "relu")]),
    "F.relu input=": (lambda m, x: F.relu(input=x), [("relu", "relu")]),
    "x.relu()": (lambda m, x: x.relu(), [("relu", "relu")]),
    "torch.relu_": (lambda m, x: torch.relu_(m.conv(x)), [("conv", "conv"), ("relu", "relu")]),
    "F.relu6": (lambda m, x: F.relu6(x), [("relu6", "relu")]),
    "F.hardtanh 0..6": (lambda m, x: F.hardtanh(x, 0.0, 6.0), [("hardtanh", "relu")]),
    "F.hardtanh max_val first": (lambda m, x: F.hardtanh(x, max_val=6.0, min_val=0.0), [("hardtanh", "relu")]),
    "F.hardtanh": (lambda m, x: F.hardtanh(x), [("hardtanh", "float_op")]),
    "torch.sigmoid": (lambda m, x: torch.sigmoid(x), [("sigmoid", "float_op")]),
    "F.silu": (lambda m, x: F.silu(x), [("silu", "float_op")]),
    "F.gelu": (lambda m, x: F.gelu(x), [("gelu", "float_op")]),
    "F.softmax": (lambda m, x: F.softmax(x, dim=-1), [("softmax", "softmax")]),
    "x.softmax": (lambda m, x: x.softmax(-1), [("softmax", "softmax")]),
    "F.max_pool2d": (lambda m, x: F.max_pool2d(x, 2), [("max_pool2d", "max_pool")]),
    "F.max_pool2d options": (
        lambda m, x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True),
        [("max_pool2d", "max_pool")],
    ),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(x, 3, 1, 1), [("avg_pool2d", "avg_pool")]),
    "F.avg_pool2d not counted": (
        lambda m, x: F.avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False),
        [("avg_pool2d", "avg_pool")],
    ),
    "F.avg_pool2d default stride": (lambda m, x: F.avg_pool2d(x, 2), [("avg_pool2d", "avg_pool")]),
    "F.adaptive_avg_pool2d": (
        lambda m, x: F.adaptive_avg_pool2d(x, 1),
        [("adaptive_avg_pool2d", "global_avg_pool")],
    ),
    "F.adaptive_avg_pool2d (1, 1)": (
        lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)),
        [("adaptive_avg_pool2d", "global_avg_pool")],
    ),
    "F.adaptive_avg_pool2d 2": (lambda m, x: F.adaptive_avg_pool2d(x, 2), [("adaptive_avg_pool2d", "float_op")]),
    "x.mean([2, 3])": (lambda m, x: x.mean([2, 3]), [("mean", "global_avg_pool")]),
    "x.mean keepdim": (lambda m, x: x.mean((-1, -2), keepdim=True), [("mean", "global_avg_pool")]),
    "torch.mean dim=": (lambda m, x: torch.mean(x, dim=(2, 3)), [("mean", "global_avg_pool")]),
    "x.mean(1)": (lambda m, x: x.mean(1), [("mean", "float_op")]),
    "x.mean((1, 2))": (lambda m, x: x.mean((1, 2)), [("mean", "float_op")]),
    "F.linear": (lambda m, x: F.linear(x, m.weight, m.bias), [("linear", "linear")]),
    "F.linear without bias": (lambda m, x: F.linear(x, m.weight), [("linear", "linear")]),
    "F.linear bias=": (lambda m, x: F.linear(x, weight=m.weight, bias=m.bias), [("linear", "linear")]),
    "F.linear of a computed weight": (lambda m, x: F.linear(x, x[0, 0]), [("linear", "float_op")]),
    "dropout": (lambda m, x: F.dropout(m.drop(m.conv(x)), 0.5, m.training), [("conv", "conv")]),
    "moves": (lambda m, x: x.flatten(1).view(-1, 4, 36).transpose(1, 2).chunk(2, 1)[0].relu(), [("relu", "relu")]),
    "padding with zeros": (lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1))), [("conv", "conv")]),
    "padding with ones": (lambda m, x: m.conv(F.pad(x, (1, 1), value=1.0)), [("pad", "float_op"), ("conv", "conv")]),
    "constants are folded": (lambda m, x: x + torch.relu(m.gain * 2), [("add", "add")]),
    "shape arithmetic": (lambda m, x: x.reshape(x.size(0), x.shape[1] * 36).relu(), [("relu", "relu")]),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case: str) -> None:
    function, expected = SPELLINGS[case]
    model = Calls(function).eval()
    graph = capture(model, IMAGES)
    assert described(graph) == expected
    with torch.no_grad():
        assert torch.equal(graph(IMAGES.clone()), model(IMAGES.clone()))
        assert close(graph(IMAGES[:1].repeat(3, 1, 1, 1)), model(IMAGES[:1].repeat(3, 1, 1, 1))), "another batch size"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.total = Block(), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.block(x), x)


def test_names_are_paths_and_a_reused_module_gets_one_for_each_call() -> None:
    names = [name for name, _ in described(capture(Named(), IMAGES))]
    assert names == [
        *("block.conv1", "block.relu", "block.conv2", "block.add", "block.relu_1"),
        "total",  # a module that is one op gives it its own name
    ]


def test_a_layer_called_twice_keeps_one_weight() -> None:
    model = Calls(lambda m, x: m.conv(m.conv(x)))
    graph = capture(model, IMAGES)
    assert described(graph) == [("conv", "conv"), ("conv_1", "conv")]
    assert len([key for key in graph.state_dict() if "conv" in key]) == 2  # weight, bias


def test_capture_leaves_the_model_alone() -> None:
    model = Calls(lambda m, x: F.relu(m.conv(x))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = capture(model, IMAGES)
    fold_batch_norm(graph)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not graph.training


def test_inputs_are_seen_through_moves() -> None:
    graph = capture(Calls(lambda m, x: m.fc(m.conv(x).transpose(1, 2).flatten(0, 1))), IMAGES)
    (conv, _), (fc, _) = layers(graph)
    (source,) = layer_inputs(fc)
    assert is_move(graph, source)
    assert source_of(graph, source) is conv


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5
    )


def swin(version: int) -> nn.Module:
    block, merge = ((SwinTransformerBlock, PatchMerging), (SwinTransformerBlockV2, PatchMergingV2))[version - 1]
    return SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
        num_classes=5, stochastic_depth_prob=0.1, block=block, downsample_layer=merge,
    )  # fmt: skip


def randomized(model: nn.Module) -> nn.Module:
    """Large random parameters and running statistics: a wrong scale or mask would show."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            value.data = torch.randn(value.shape, generator=generator) * (1 if value.ndim < 2 else 0.3)
        if name.endswith("running_var"):
            value.data = value.data.abs() + 0.1
    return model.eval()


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(vit, (16, 16), id="vit"),
        pytest.param(lambda: swin(1), (16, 16), id="swin, shifted windows"),
        pytest.param(lambda: swin(1), (20, 14), id="swin, padded windows"),
        pytest.param(lambda: swin(1), (8, 24), id="swin, one window along an axis"),
        pytest.param(lambda: swin(2), (16, 16), id="swin v2"),
        pytest.param(lambda: swin(2), (20, 14), id="swin v2, padded windows"),
    ],
)
def test_attention_is_expanded(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model = randomized(build())
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(2))
    graph = capture(model, images)
    kinds = [kind for _, kind in described(graph)]
    blocks = 2 if isinstance(model, VisionTransformer) else 4
    assert kinds.count("matmul") == 2 * blocks
    assert kinds.count("softmax") == blocks
    with torch.no_grad():
        assert close(graph(images), model(images))


def test_attention_names() -> None:
    graph = capture(vit(), torch.zeros(1, 3, 16, 16))
    prefix = "encoder.layers.encoder_layer_0.self_attention."
    inside = [name.removeprefix(prefix) for name, _ in described(graph) if name.startswith(prefix)]
    assert inside == ["q_proj", "k_proj", "v_proj", "matmul", "softmax", "matmul_1", "out_proj"]


class Attention(nn.Module):
    def __init__(self, *, mask: bool = False, first: bool = True, **options: Any) -> None:
        super().__init__()
        self.mask = mask
        self.attention = nn.MultiheadAttention(6, 2, batch_first=first, **options)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(6, 6) if self.mask else None
        return self.attention(x[:, 0], x[:, 1], x[:, 2], need_weights=False, attn_mask=mask)[0].relu()


@pytest.mark.parametrize("options", [{}, {"first": False}, {"bias": False}], ids=str)
def test_attention_variants(options: dict[str, Any]) -> None:
    model = randomized(Attention(**options))
    graph = capture(model, IMAGES)
    with torch.no_grad():
        assert close(graph(IMAGES), model(IMAGES))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"mask": True}], ids=str)
def test_attention_of_other_kinds(options: dict[str, Any]) -> None:
    model = randomized(Attention(**options))
    graph = capture(model, IMAGES)
    with torch.no_grad():
        assert close(graph(IMAGES), model(IMAGES))
    assert {"matmul", "softmax"} <= {kind for _, kind in described(graph)}


NORMS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "norm without gain": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 6, 6)),
    "frozen": (nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 3), nn.BatchNorm1d(3), (2, 4, 5)),
    "linear": (nn.Linear(6, 5), nn.BatchNorm1d(5), (3, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_folded(name: str) -> None:
    layer, norm, shape = NORMS[name]
    model = randomized(nn.Sequential(layer, norm))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    graph = capture(model, x)
    assert fold_batch_norm(graph) == {"1": "0"}
    assert [name for name, _ in described(graph)] == ["0"]
    with torch.no_grad():
        assert close(graph(x), model(x))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(TwoHeads(), (2, 4, 6, 6), id="the layer has another user"),
        pytest.param(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), (2, 4, 6, 6), id="no layer before it"),
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
            (2, 4, 6, 6),
            id="an activation between",
        ),
        pytest.param(nn.Sequential(nn.ReLU(), FrozenBatchNorm2d(4)), (2, 4, 6, 6), id="frozen, no layer before it"),
        pytest.param(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (2, 4, 6), id="other axis than the outputs"),
    ],
)
def test_batch_norm_that_no_layer_absorbs(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = randomized(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    graph = capture(model, x)
    assert fold_batch_norm(graph) == {}
    (norm,) = (name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__)
    assert dict(described(graph))[norm] == "conv"
    with torch.no_grad():
        assert close(graph(x), model(x))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda m, x: F.relu(m.conv(x)), {"conv": "relu"}, id="conv"),
        pytest.param(lambda m, x: F.relu6(m.conv(x) + x), {"add": "relu6"}, id="add"),
        pytest.param(lambda m, x: F.relu(F.gelu(x)), {"gelu": "relu"}, id="float op"),
        pytest.param(lambda m, x: F.relu(F.max_pool2d(x, 2)), {}, id="max pool keeps its input's grid"),
        pytest.param(lambda m, x: F.relu(x), {}, id="the model's input"),
        pytest.param(lambda m, x: (lambda y: F.relu(y) + y)(m.conv(x)), {}, id="another user"),
        pytest.param(lambda m, x: F.relu(m.conv(x).flatten(1)), {}, id="a move between"),
        pytest.param(lambda m, x: F.relu(m.conv(x).view(x.size(0), 4, 6, 6)), {}, id="a shape of it"),
    ],
)
def test_fused_activations(function: Callable[[Any, Tensor], Tensor], expected: dict[str, str]) -> None:
    graph = capture(Calls(function), IMAGES)
    assert {name_of(a): name_of(b) for a, b in fused_activations(graph).items()} == expected


def test_stochastic_depth_and_identities_are_gone() -> None:
    model = nn.Sequential(nn.Identity(), StochasticDepth(0.5, "row"), nn.Dropout2d(0.3), nn.Conv2d(4, 2, 1))
    assert described(capture(model, IMAGES)) == [("3", "conv")]


def branches(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(
            branches, "the model cannot be captured: it decides on the values of a tensor", id="branches on values"
        ),
        pytest.param(lambda m, x: sum(m.conv(y) for y in x), "cannot be captured", id="loops over a batch"),
        pytest.param(
            lambda m, x: m.fc(x.flatten(1)),
            r"it fails at 'fc' \(.*test_graph.py:\d+\) on an input of shape \(2, 4, 6, 6\)",
            id="sizes",
        ),
        pytest.param(lambda m, x: (m.conv(x), x), "the model must return one tensor of logits", id="returns a tuple"),
        pytest.param(lambda m, x: {"out": m.conv(x)}, "the model must return one tensor", id="returns a dict"),
        pytest.param(lambda m, x: m.missing(x), "the model cannot be captured.*missing", id="an attribute is missing"),
    ],
)
def test_models_that_cannot_be_captured(function: Callable[[Any, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        capture(Calls(function), IMAGES)
    assert "\n" not in str(caught.value)
