"""Attention is products and a softmax, however it is spelt."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from redrawn import IMAGES, redraw
from torch import Tensor, nn

from qlib.graph import kind_of, ops
from qlib.graph.capture import capture
from qlib.graph.ir import layers


class Attention(nn.Module):
    """Attention of four heads in some spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 5)
        self.register_buffer("bias", torch.randn(1, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(len(x), 4, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "fused with a bias":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.spelling == "fused with a mask":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias > -0.3)
        elif self.spelling == "fused with a mask changed in place as a whole":
            mask = torch.zeros(4, 4, dtype=torch.bool).logical_not_()
            mask[0:2, 3:] = False
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.spelling == "fused with a mask that masks nothing":
            every = torch.ones(1, 1, 4, 4, dtype=torch.bool).expand(x.shape[0], -1, -1, -1)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=every)
        elif self.spelling == "causal":
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.spelling == "of another sign":
            x = ((-0.5 * q) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.spelling == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q * 0.5, k).softmax(-1)
            x = torch.einsum("bhij,bhjd->bhid", weights, v)
        elif self.spelling == "grouped queries":
            x = F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)
        else:
            x = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], 4, 16).mean(1))


@pytest.mark.parametrize(
    "spelling",
    [
        "fused",
        "fused with a bias",
        "fused with a mask",
        "fused with a mask that masks nothing",
        "fused with a mask changed in place as a whole",
        "causal",
        "grouped queries",
        "einsum",
        "written out",
    ],
)
def test_attention_is_products_and_a_softmax(spelling: str) -> None:
    model = redraw(Attention(spelling))
    graph = capture(model, IMAGES[:2])
    kinds = [kind_of(module) for _, module in layers(graph)]
    assert kinds.count("matmul") == 2
    assert kinds.count("softmax") == 1
    assert kinds.count("float_op") == 1  # the mean over tokens
    with torch.no_grad():
        assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)


class OneToken(nn.Module):
    """Attention over one token, and over one key by several queries."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(24, 48)
        self.proj = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.mean(2).flatten(1))[:, None].chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v
        several = (q.reshape(-1, 4, 4) @ k[..., :4].transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x + several.mean(1, keepdim=True)).flatten(1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_softmax_over_one_element_is_1(fused: bool) -> None:
    model = redraw(OneToken(fused))
    graph = capture(model, IMAGES[:2])
    kinds = [kind_of(module) for _, module in layers(graph)]
    assert kinds == ["float_op", "linear", "float_op", "add", "linear"], "means, and what is made of the value"
    with torch.no_grad():
        assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)


def test_a_softmax_over_images_is_a_float_layer() -> None:
    """ONNX Runtime's integer kernel would give 0 where one image comes alone."""

    class OverImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x.flatten(1))
            return F.softmax(x @ x.transpose(0, 1), -1) @ x

    model = redraw(OverImages())
    graph = capture(model, IMAGES[:2])
    assert [kind_of(module) for _, module in layers(graph)] == ["linear", "matmul", "float_op", "matmul"]
    with torch.no_grad():
        assert all(torch.allclose(graph(part), model(part), atol=1e-6) for part in (IMAGES[:3], IMAGES[:1]))


def test_a_factor_below_zero_stays_a_layer() -> None:
    model = redraw(Attention("of another sign"))
    graph = capture(model, IMAGES[:2])
    with torch.no_grad():
        assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)
    assert all(module.alpha > 0 for _, module in layers(graph) if isinstance(module, ops.MatMul))
