"""Matrix products, writes into parts of a tensor, pads and constants, in the spellings that models have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from redrawn import IMAGES, redraw
from torch import Tensor, nn
from whole_path import plan_eight_bits

from qlib.graph.capture import capture
from qlib.graph.ir import layers
from qlib.lower import lower


class Net(nn.Module):
    """A convolution, and what a row of the table does with its output ``[N, 8, 4, 4]``."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(3, 8, 2, 2)
        self.tables = nn.Parameter(torch.zeros(4, 5, 8))
        self.matrix = nn.Parameter(torch.zeros(8, 7))
        self.vector = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.conv(x)).flatten(1)


def einsum(equation: str, operands: Callable[[Net, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Net, Tensor], Tensor]:
    return lambda net, x: torch.einsum(equation, *operands(net, x))


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def write_part(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1:, 1:] = x[:, :, 1:, 1:].relu()
    return x


def write_one(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2] = x[:, 3]
    return x


def write_last(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] += x[:, 3]
    return x


def write_all(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:] = x.relu()
    return x


def write_a_table(net: Net, x: Tensor) -> Tensor:
    table = torch.zeros(4, 4)
    table[1:, 1:].copy_(net.tables[0, :3, :3])
    return x + table


SPELLINGS = [
    pytest.param(
        einsum("bchw,hkc->bhwk", lambda net, x: (x, net.tables)), ["MatMul"], id="einsum, an axis of both in the middle"
    ),
    pytest.param(einsum("bchw,bkhw->bck", lambda net, x: (x, x)), ["MatMul"], id="einsum, two axes summed"),
    pytest.param(einsum("...hw,...kw->...hk", lambda net, x: (x, x)), ["MatMul"], id="einsum with dots"),
    pytest.param(einsum("bchw,ck->bkhw", lambda net, x: (x, net.matrix)), ["MatMul"], id="einsum with a matrix"),
    pytest.param(einsum("bchw,c->bhw", lambda net, x: (x, net.vector)), ["MatMul"], id="einsum with a vector"),
    pytest.param(einsum("bchw,c->bchw", lambda net, x: (x, net.vector)), ["Mul"], id="einsum that sums nothing"),
    pytest.param(einsum("bi,bj->bij", lambda net, x: (x[:, 0, 0], x[:, 1, 0])), ["Mul"], id="einsum, an outer product"),
    pytest.param(
        einsum("bchw,hkc->bhwk", lambda net, x: (x.reshape(len(x), 8, 4, 4), net.tables)),
        ["MatMul"],
        id="einsum, counted by the images",
    ),
    pytest.param(einsum("bchw,bkhw->bc", lambda net, x: (x, x)), ["Function"], id="einsum, a sum of one operand"),
    pytest.param(einsum("bchh,hkc->bhk", lambda net, x: (x, net.tables)), ["Function"], id="einsum of a diagonal"),
    pytest.param(
        lambda net, x: torch.baddbmm(x.flatten(2)[:, :, :8], x.flatten(2), rows(x), alpha=0.5),
        ["MatMul", "Add"],
        id="baddbmm",
    ),
    pytest.param(lambda net, x: torch.addmm(net.vector[:7], x[:, :, 0, 0], net.matrix, beta=0), ["MatMul"], id="addmm"),
    pytest.param(lambda net, x: x.relu() + 0.1 * x, ["ReLU", "Add"], id="a factor of what is added"),
    pytest.param(lambda net, x: (y := x * 0.5) + y.flip(2), ["Add"], id="a factor of both that are added"),
    pytest.param(lambda net, x: (y := x / 2) * y, ["Mul"], id="a factor of both that are multiplied"),
    pytest.param(lambda net, x: (x * x.sigmoid() * 2) * 0.7, ["Sigmoid", "Mul"], id="two factors of a product"),
    pytest.param(lambda net, x: x.relu() * 1.0, ["ReLU"], id="a factor of 1"),
    pytest.param(lambda net, x: x - 0.1 * x.relu(), ["ReLU", "Function", "Function"], id="a factor of a difference"),
    pytest.param(lambda net, x: x.relu() + -0.1 * x, ["ReLU", "Function", "Add"], id="a negative factor"),
    pytest.param(write_part, ["ReLU", "Concat", "Concat"], id="a part is written"),
    pytest.param(write_one, [], id="a channel is written: all values are moved"),
    pytest.param(write_last, ["Add", "Concat"], id="the last channel is added to"),
    pytest.param(write_a_table, ["Add"], id="a part of a constant is written"),
    pytest.param(write_all, ["ReLU"], id="all is written"),
    pytest.param(
        lambda net, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2), ["MaxPool2d"], id="max pool, same"
    ),
    pytest.param(
        lambda net, x: F.max_pool2d(F.pad(x, (2, 1), value=-math.inf), (1, 3), 1), ["MaxPool2d"], id="max pool, a row"
    ),
    pytest.param(
        lambda net, x: F.max_pool2d(F.pad(x, (0, 2), value=-math.inf), (1, 3), 1, 0, 2),
        ["Function", "MaxPool2d"],
        id="max pool with gaps",
    ),
    pytest.param(lambda net, x: x.flatten(2).max(2)[0], ["Function"], id="a maximum without its place"),
    pytest.param(lambda net, x: torch.cat([x, torch.zeros_like(x)], 1), ["Concat"], id="zeros like"),
    pytest.param(lambda net, x: torch.cat([x, x.new_full((len(x), 1, 4, 4), 2.5)], 1), ["Concat"], id="new, full"),
    pytest.param(lambda net, x: x + torch.ones(x.shape[0], 8, 4, 4), ["Add"], id="ones"),
]


@pytest.mark.parametrize(("body", "kinds"), SPELLINGS)
@torch.no_grad()
def test_layers_of_a_spelling(body: Callable[[Net, Tensor], Tensor], kinds: list[str]) -> None:
    model = redraw(Net(body))
    graph = capture(model, IMAGES[:2])
    assert [type(module).__name__ for _, module in layers(graph)][1:] == kinds
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "layer", "note"),
    [
        pytest.param(lambda net, x: x * (x > 0).to(x.dtype), "gt", "its output is torch.bool", id="a mask"),
        pytest.param(
            lambda net, x: x.flatten(2) + x.argmax(1).flatten(1)[:, None],
            "argmax",
            "its output is torch.int64",
            id="places",
        ),
    ],
)
@torch.no_grad()
def test_what_is_not_one_tensor_of_floats_stays_in_float(
    body: Callable[[Net, Tensor], Tensor], layer: str, note: str
) -> None:
    graph = capture(redraw(Net(body)), IMAGES[:2])
    plan = plan_eight_bits(graph, {}, IMAGES)
    assert note in plan.layers[layer].note
    assert torch.allclose(lower(graph, plan)(IMAGES), graph(IMAGES), atol=0.3)
