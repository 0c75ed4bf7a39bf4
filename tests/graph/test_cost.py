"""Multiply-accumulates against torch's own counter of floating-point operations, which counts two for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, shufflenet_v2_x0_5, squeezenet1_1

from qlib.graph import capture
from qlib.graph.cost import layer_costs
from qlib.models import create_model, find_model


class Attention(nn.Module):
    """Attention of four heads over 16 tokens, in some spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.patch, self.qkv, self.proj = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)
        self.packed = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        if self.spelling == "packed":
            return self.proj(self.packed(tokens, tokens, tokens, need_weights=False)[0])  # type: ignore[no-any-return]
        q, k, v = self.qkv(tokens).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.spelling == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "einsum":
            y = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", y, v)
        else:
            y = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Products(nn.Module):
    """Matrix products that broadcast, on either side, and with a matrix that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix) @ (x[:, :1].transpose(2, 3) @ x)[:, :, :5]


class Functional(nn.Module):
    """Layers that are calls, of a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        y = F.conv2d(x, weight, stride=2, dilation=2)
        return F.linear(y.mean((2, 3)), self.weight.flatten(1)[:, :6])


LAYERS = [
    pytest.param(lambda: nn.Conv2d(3, 6, 3, stride=2, dilation=2), id="conv2d"),
    pytest.param(lambda: nn.Conv2d(3, 6, (1, 3), padding="same", bias=False), id="conv2d, same"),
    pytest.param(lambda: nn.Conv2d(3, 9, 3, groups=3, padding=1), id="grouped"),
    pytest.param(lambda: nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), id="transposed"),
    pytest.param(lambda: nn.ConvTranspose2d(3, 6, 2, groups=3), id="transposed and grouped"),
    pytest.param(lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5, stride=3)), id="conv1d"),
    pytest.param(lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, (2, 3, 3))), id="conv3d"),
    pytest.param(lambda: nn.Linear(16, 5), id="linear over rows"),
    pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), id="linear"),
    pytest.param(Functional, id="functional"),
]
MODELS = [
    *(pytest.param(lambda s=s: Attention(s), id=f"{s} attention") for s in ("packed", "fused", "einsum", "written")),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8)),
        id="block",
    ),
]


def counted(model: nn.Module, image: Tensor) -> FlopCounterMode:
    with FlopCounterMode(depth=9, display=False) as counter:  # with gradients: else attention is one op, not counted
        model.eval()(image)
    return counter


@pytest.mark.parametrize("make", LAYERS + MODELS)
def test_macs_are_half_of_torchs_flops(make: Callable[[], nn.Module]) -> None:
    model, image = make(), torch.randn(1, 3, 16, 16)
    costs = layer_costs(capture(model, image))
    assert 2 * sum(cost.macs for cost in costs) == counted(model, image).get_total_flops() > 0


def test_products_that_broadcast() -> None:
    image = torch.randn(1, 3, 8, 8)
    costs = layer_costs(capture(Products(), image))
    assert 2 * sum(cost.macs for cost in costs) == counted(Products(), image).get_total_flops()


KNOWN = {
    "squeezenet1_1": squeezenet1_1,
    "shufflenet_v2_x0_5": shufflenet_v2_x0_5,
    "vision transformer": lambda: VisionTransformer(64, 16, 2, 4, 32, 64),
    "timm": lambda: create_model(find_model("timm/test_efficientnet")),
}


@pytest.mark.parametrize("name", KNOWN)
def test_macs_of_known_models(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    model, image = KNOWN[name](), torch.randn(1, 3, 64, 64)
    costs = layer_costs(capture(model, image))
    counter = counted(model, image)
    assert 2 * sum(cost.macs for cost in costs) == counter.get_total_flops()
    flops = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    of_layers = {cost.name: 2 * cost.macs for cost in costs if cost.name in flops}
    assert len(of_layers) > 5
    assert of_layers == {layer: flops[layer] for layer in of_layers}
