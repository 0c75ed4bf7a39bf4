"""Batch-norms fold, whatever is between them and the layer before them, and whatever the shape of what they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from redrawn import IMAGES, redraw
from torch import Tensor, nn

from qlib.graph import fold_batch_norm, ops
from qlib.graph.capture import capture
from qlib.graph.folded import fold
from qlib.graph.ir import layers, name_of
from qlib.graph.norms import BATCH_NORMS
from qlib.lower.trainable import prepare_qat


class Tokens(nn.Module):
    """A linear layer over the tokens of a patch embedding, and a batch-norm after it in some spelling."""

    def __init__(self, spelling: Callable[[Tokens, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.conv = nn.Conv2d(6, 10, 1)
        self.fc = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.norm2 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        plane = self.patch(x)
        return self.head(self.spelling(self, plane, plane.flatten(2).transpose(1, 2)))


def rows(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    y = net.fc(tokens)
    return net.norm(y.flatten(0, 1)).reshape_as(y).mean(1)


def counted_rows(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    y = net.fc(tokens)
    return net.norm(y.reshape(len(plane) * y.shape[1], 10)).view(len(plane), -1, 10).mean(1)


def turned(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm(net.fc(tokens).transpose(1, 2)).mean(2)


def channels_last(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm2(net.fc(plane.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3))


def flat_convolution(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm(net.conv(plane).flatten(2)).mean(2)


def mixed_channels(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm(net.fc(tokens).reshape(len(plane), 10, -1)).mean(2)


def padded(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm2(nn.functional.pad(net.conv(plane), (1, 1, 1, 1))).mean((2, 3))


def after_a_mean(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm(net.fc(tokens).mean(1))


def after_a_relu(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    return net.norm(net.fc(tokens).relu().transpose(1, 2)).mean(2)


def twice(net: Tokens, plane: Tensor, tokens: Tensor) -> Tensor:
    y = net.fc(tokens).relu().transpose(1, 2)
    return net.norm(net.norm(y)).mean(2)


SPELLINGS = [
    pytest.param(rows, {"norm": "fc"}, id="rows of tokens"),
    pytest.param(counted_rows, {"norm": "fc"}, id="rows, counted by the images"),
    pytest.param(turned, {"norm": "fc"}, id="transposed"),
    pytest.param(channels_last, {"norm2": "fc"}, id="a plane, channels last"),
    pytest.param(flat_convolution, {"norm": "conv"}, id="a convolution, flat"),
    pytest.param(mixed_channels, {}, id="channels that are mixed"),
    pytest.param(padded, {}, id="padded with zeros"),
    pytest.param(after_a_mean, {}, id="one vector an image"),
    pytest.param(after_a_relu, {}, id="after an activation"),
    pytest.param(twice, {}, id="one norm, called twice"),
]


@pytest.mark.parametrize(("spelling", "folded"), SPELLINGS)
@torch.no_grad()
def test_batch_norms_fold_or_are_layers_of_their_own(
    spelling: Callable[[Tokens, Tensor, Tensor], Tensor], folded: dict[str, str]
) -> None:
    model = redraw(Tokens(spelling))
    expected = model(IMAGES)
    graph = capture(model, IMAGES[:2])
    assert torch.allclose(graph(IMAGES), expected, atol=1e-6)
    assert fold_batch_norm(graph) == folded
    assert torch.allclose(graph(IMAGES), expected, atol=1e-5)
    left = {name_of(node): module for node, module in layers(graph)}
    assert not [name for name, module in left.items() if isinstance(module, BATCH_NORMS)]
    assert any(isinstance(module, ops.ChannelAffine) for module in left.values()) == (not folded)


@pytest.mark.parametrize("spelling", [rows, turned, channels_last, flat_convolution])
def test_they_train_as_the_model_does(spelling: Callable[[Tokens, Tensor, Tensor], Tensor]) -> None:
    """The layer and its batch-norm are one in training: outputs and running statistics are those of the model."""
    model = redraw(Tokens(spelling))
    trained = prepare_qat(capture(model, IMAGES[:2], share=True))
    copies = {name: value.clone() for name, value in model.named_buffers()}
    expected = model.train()(IMAGES)
    after = {name: value.clone() for name, value in model.named_buffers()}
    model.load_state_dict({**model.state_dict(), **copies})
    assert torch.allclose(trained.train()(IMAGES), expected, atol=1e-5)
    for name, value in model.named_buffers():
        assert torch.allclose(value, after[name], atol=1e-5), name


def test_shapes_are_those_of_the_example() -> None:
    graph = fold(redraw(Tokens(counted_rows)), IMAGES).graph
    shapes = {name_of(node): node.meta["shape"] for node, _ in layers(graph)}
    assert shapes["fc"] == (48, 10)
