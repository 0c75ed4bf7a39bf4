"""One normal form: however a user spells a layer, the graph has the same module of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from redrawn import IMAGES, redraw
from torch import Tensor, nn

from qlib.errors import ModelError
from qlib.graph import fold_batch_norm, kind_of
from qlib.graph.capture import capture
from qlib.graph.ir import layers, name_of


class Conv2dSame(nn.Conv2d):
    """A subclass with a forward method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(
            self.weight
        )
        return F.conv2d(x, weight, self.bias, padding=1)


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return self.act(x)


class Net(nn.Module):
    """A convolution and a batch-norm in some spelling, and a classifier."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Functional(Net):
    def body(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu_()


class Reparametrized(Net):
    """Two convolutions whose weights are added, as RepVGG deploys them."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        weight = self.conv.weight + F.pad(self.branch.weight, (1, 1, 1, 1))
        return F.relu(self.norm(F.conv2d(x, weight, self.conv.bias + self.branch.bias, padding=1)))


class Flagged(Net):
    """Control flow on values of Python, and on sizes."""

    deep = False

    def body(self, x: Tensor) -> Tensor:
        x = super().body(x)
        for _ in range(2 if self.deep else 1):
            x = x + 1 if x.shape[1] == 3 else x
        return x if len(x) else x * 0


class UnderNoGrad(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().body(x)


SPELLINGS = [
    ("modules", lambda: Net(), ["conv", "norm"]),
    ("subclass", lambda: Net(conv=Conv2dSame(3, 8, 3)), ["conv", "norm"]),
    ("functional", lambda: Functional(), ["conv", "norm"]),
    ("functional batch-norm with its activation", lambda: Net(norm=NormAct(8)), ["conv", "norm"]),
    ("weight standardization", lambda: Net(conv=StandardizedConv2d(3, 8, 3)), ["conv", "norm"]),
    ("reparametrization", lambda: Reparametrized(), ["conv2d", "norm"]),
    ("weight norm", lambda: Net(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))), None),
    ("control flow on Python values", lambda: Flagged(), ["conv", "norm"]),
    ("torch.no_grad", lambda: UnderNoGrad(), ["conv", "norm"]),
]


@pytest.mark.parametrize(("make", "names"), [row[1:] for row in SPELLINGS], ids=[row[0] for row in SPELLINGS])
def test_a_convolution_is_one_however_it_is_spelt(make: object, names: list[str] | None) -> None:
    model = redraw(make())  # type: ignore[operator]
    graph = capture(model, IMAGES[:2])
    kinds = [kind_of(module) for _, module in layers(graph)]
    assert "conv" in kinds
    assert "linear" in kinds
    assert "float_op" not in {
        kind for kind, (_, module) in zip(kinds, layers(graph), strict=True) if isinstance(module, nn.Conv2d)
    }
    if names is not None:
        assert [name_of(node) for node, _ in layers(graph)][:2] == names
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.allclose(graph(IMAGES), expected, atol=1e-6)
        fold_batch_norm(graph)
        assert torch.allclose(graph(IMAGES), expected, atol=1e-5)
    assert not [module for _, module in layers(graph) if isinstance(module, nn.BatchNorm2d)]


class WritesIntoViews(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x[:, ::2] *= 0.5
        return self.fc(x.mean((2, 3)))


class WritesUnderViews(Net):
    """A part of a tensor is taken, and sees what is then done to the whole."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        part = x[:, :4]
        x.relu_()
        return self.fc(torch.cat([part, x[:, 4:]], 1).mean((2, 3)))


class WritesAndForgets(Net):
    """The result of an op in place is not used, the tensor is."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x.mul_(0.5)
        x.add_(1)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [WritesIntoViews, WritesUnderViews, WritesAndForgets])
def test_what_is_written_in_place_is_not_lost(kind: type[Net]) -> None:
    model = redraw(kind())
    with torch.no_grad():
        assert torch.allclose(capture(model, IMAGES[:2])(IMAGES), model(IMAGES), atol=1e-6)


class WritesIntoConstants(Net):
    """A table of the model is changed on the way, in a copy and in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.clone()
        table[2:4].fill_(5.0)
        return self.fc(self.body(x).mean((2, 3)) * table)


def test_constants_are_computed_in_order_and_the_models_stay() -> None:
    model = redraw(WritesIntoConstants())
    before = model.table.clone()  # type: ignore[operator]
    graph = capture(model, IMAGES[:2])
    assert torch.equal(model.table, before)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)


class DividesByTheBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 / len(x))


class OnValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class NoInput(Net):
    def forward(self) -> Tensor:  # type: ignore[override]
        return super().forward(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (OnValues(), r"decides on the values of a tensor, .* at .*test_capture_spellings.py:\d+; rewrite that"),
        (DividesByTheBatch(), "what it computes depends on how many images are in a batch; rewrite"),
        (TwoInputs(), r"the forward method of TwoInputs takes 2 inputs \(x, y\); images are one: wrap the model"),
        (NoInput(), "the forward method of NoInput takes no input; images are one: wrap the model"),
    ],
    ids=["control flow on values", "a number of the batch", "two inputs", "no input"],
)
def test_what_cannot_be_captured(model: nn.Module, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        capture(model, IMAGES[:2])


def test_the_model_stays_as_it_is() -> None:
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = capture(model, IMAGES[:2])
    assert model.training
    for parameter in graph.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_shared_graph_has_the_models_own_tensors() -> None:
    model = Functional()
    graph = capture(model, IMAGES[:2], share=True)
    assert {id(parameter) for parameter in graph.parameters()} == {id(parameter) for parameter in model.parameters()}
    norm = next(module for _, module in layers(graph) if isinstance(module, nn.BatchNorm2d))
    assert norm.running_mean is model.norm.running_mean
