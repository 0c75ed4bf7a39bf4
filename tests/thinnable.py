"""Small models whose channels are tied in the ways that there are, with the classes of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = (2, 3, 4, 4)
"""The shape of a batch that they take."""


class Of(nn.Module):
    """A model of a forward function and layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def logits(m: Of, x: Tensor) -> Tensor:
    return m.last(x.mean((2, 3)))


def shuffled(m: Of, x: Tensor) -> Tensor:
    x = torch.cat([m.a(x), m.b(x)], 1)
    n, c, h, w = x.shape
    return logits(m, x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def attention(m: Of, x: Tensor) -> Tensor:
    x = m.a(x).flatten(2).transpose(1, 2)
    n, t, c = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
    x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return m.last(m.proj(x.transpose(1, 2).reshape(n, t, c)).mean(1))


def tokens(m: Of, x: Tensor) -> Tensor:
    x = m.a(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.place
    return m.last(m.norm(x).mean(1))


def conv(i: int, o: int, **more: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 1, bias=False, **more)


CASES = [
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.b(m.norm(m.a(x)).relu())), a=conv(3, 4), norm=nn.BatchNorm2d(4),
                   b=conv(4, 6), last=nn.Linear(6, 2)),
        {"a.weight:0 norm.weight:0 norm.bias:0 norm.running_mean:0 norm.running_var:0 b.weight:1": 4,
         "b.weight:0 last.weight:1": 6},
        id="a chain",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.b(m.a(x)) + m.a(x)), a=conv(3, 4), b=conv(4, 4), last=nn.Linear(4, 2)),
        {"a.weight:0 b.weight:0 b.weight:1 last.weight:1": 4},
        id="a residual",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 2),
                   last=nn.Linear(6, 2)),
        {"a.weight:0 last.weight:1": 4, "b.weight:0 last.weight:1": 2},
        id="a concatenation ties nothing",
    ),
    pytest.param(
        lambda: Of(shuffled, a=conv(3, 4), b=conv(3, 4), last=nn.Linear(8, 2)),
        {"a.weight:0 b.weight:0 last.weight:1x2": 4},
        id="a shuffle ties what it puts side by side",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.b(m.a(x))), a=conv(3, 4), b=conv(4, 8, groups=4), last=nn.Linear(8, 2)),
        {"a.weight:0 b.weight:0x2 last.weight:1x2": 4},
        id="a depthwise convolution with a multiplier",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.b(m.a(x))), a=conv(3, 4), b=conv(4, 6, groups=2), last=nn.Linear(6, 2)),
        {"a.weight:0x2 b.weight:0x3 last.weight:1x3": 2},
        id="a group is a class",
    ),
    pytest.param(
        lambda: Of(lambda m, x: m.last(m.a(x).flatten(1)), a=conv(3, 2), last=nn.Linear(32, 2)),
        {"a.weight:0 last.weight:1x16": 2},
        id="a channel has the columns of its positions",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.a(x) * m.gate(m.a(x)).sigmoid()), a=conv(3, 4), gate=conv(4, 1),
                   last=nn.Linear(4, 2)),
        {"a.weight:0 gate.weight:1 last.weight:1": 4},
        id="a gate over all channels ties nothing",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, F.pad(m.a(x), (0, 0, 0, 0, 1, 1)) + m.b(x)), a=conv(3, 2), b=conv(3, 4),
                   last=nn.Linear(4, 2)),
        {"a.weight:0 b.weight:0 last.weight:1": 2, "b.weight:0 last.weight:1": 2},
        id="padded channels are those of what is added",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.t(F.pad(m.a(x), (1, 1, 1, 1)))), a=conv(3, 4),
                   t=nn.ConvTranspose2d(4, 6, 2, bias=False), last=nn.Linear(6, 2)),
        {"a.weight:0 t.weight:0": 4, "t.weight:1 last.weight:1": 6},
        id="a transposed convolution",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), last=nn.Linear(2, 2)),
        {"a.weight:0x4 last.weight:1": 2},
        id="a pixel shuffle",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.norm(m.a(x))), a=conv(3, 6), norm=nn.GroupNorm(3, 6), last=nn.Linear(6, 2)),
        {"a.weight:0x2 norm.weight:0x2 norm.bias:0x2 last.weight:1x2": 3},
        id="whole groups of a group norm",
    ),
    pytest.param(
        lambda: Of(attention, a=conv(3, 4), qkv=nn.Linear(4, 4 * 3), proj=nn.Linear(4, 4), last=nn.Linear(4, 2)),
        {"a.weight:0 qkv.weight:1": 4, "qkv.weight:0x6 qkv.bias:0x6 proj.weight:1x2": 2,
         "proj.weight:0 proj.bias:0 last.weight:1": 4},
        id="heads",
    ),
    pytest.param(
        lambda: Of(tokens, a=conv(3, 4), token=nn.Parameter(torch.ones(1, 1, 4)),
                   place=nn.Parameter(torch.ones(1, 17, 4)), norm=nn.LayerNorm(4), last=nn.Linear(4, 2)),
        {"token:2 place:2 a.weight:0 norm.weight:0 norm.bias:0 last.weight:1": 4},
        id="tokens and places",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=conv(3, 4), b=conv(3, 4),
                   last=nn.Linear(4, 2)),
        {"a.weight:0 b.weight:0 last.weight:1": 4},
        id="a stack",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.a(x)[:, 1:].index_select(1, torch.tensor([0, 2, 3]))), a=conv(3, 6),
                   last=nn.Linear(3, 2)),
        {"a.weight:0": 1, "a.weight:0 last.weight:1": 2},
        id="a choice of places",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.a(x).roll(3, 1)), a=conv(3, 8), last=nn.Linear(8, 2)),
        {"a.weight:0 last.weight:1": 8},
        id="a roll becomes a gather",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(3, 8), last=nn.Linear(8, 2)),
        {"a.weight:0 last.weight:1": 8},
        id="halves, which may differ",
    ),
    pytest.param(
        lambda: Of(lambda m, x: logits(m, m.a(x).cumsum(1)), a=conv(3, 4), last=nn.Linear(4, 2)),
        {},
        id="what no rule knows is pinned",
    ),
    pytest.param(
        lambda: Of(lambda m, x: m.last(m.mix(m.a(x).flatten(2)).mean(2)), a=conv(3, 4), mix=nn.Linear(16, 8),
                   last=nn.Linear(4, 2)),
        {"a.weight:0 last.weight:1": 4},
        id="a layer that mixes positions keeps its own",
    ),
]  # fmt: skip
"""A function that makes the model; the axes that consecutive classes share -> how many classes."""
