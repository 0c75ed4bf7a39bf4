"""Quantizers of a schedule at work on a graph: who has which layer, what is shared, what is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from qlib.config.flags.groups import TrainArgs
from qlib.config.layers.settings import Rule
from qlib.config.schedule.types import Component, PolicySpec
from qlib.errors import ConfigError
from qlib.graph import FoldedGraph, Graph, capture, fold_batch_norm
from qlib.graph.kinds import DROPOUTS
from qlib.lower import lower
from qlib.lower.trainable import TrainableLayer, prepare_qat, trainable_layers
from qlib.qat.few_codes import ClippedActivation
from qlib.qat.methods.lsq import LsqActivation
from qlib.qat.quantization import Quantization
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats
from qlib.train.optimizers import make_optimizer
from qlib.train.policy import Batch, Losses


class Net(nn.Module):
    """A pre-activation block between a stem and a head: batch-norms of both kinds, an add, a late ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pre_bn, self.pre_relu = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.pool, self.late_relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(self.pre_relu(self.pre_bn(x))))
        x = self.late_relu(self.pool(self.conv3(x + y)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A tensor that a convolution and an add read; a convolution behind the add and a pool read its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = x + self.conv2(x)
        return self.fc((x + self.conv3(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def spec(
    cls: str = "LSQQuantizer", start: int = 0, rules: Mapping[str, dict[str, Any]] | None = None, **keys: Any
) -> PolicySpec:
    """A quantizer of 4 bits that begins in an epoch."""
    overrides = tuple(Rule(pattern, settings, {}, "a.yaml:5") for pattern, settings in (rules or {}).items())
    settings = {"bits_activations": 4, "bits_weights": 4, "edges": "all", **keys}
    return PolicySpec(Component("quantizers", cls, cls, settings, overrides, "a.yaml:2"), start, start + 1)


def calibrate(graph: Graph, count: int) -> ModelStats:
    collector = Collector(graph, histograms=True)
    collector.update(images()[:count], consumed=count)
    return ModelStats(collector.result(), {})


def quantization(model: nn.Module, *specs: PolicySpec) -> Quantization:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias)
    graph, folded = capture(model, images(2), share=True), capture(model, images(2))
    names = fold_batch_norm(folded)
    return Quantization(graph, FoldedGraph(folded, names), specs, calibrate)


def layer(work: Quantization, name: str) -> TrainableLayer:
    return dict(trainable_layers(work.module))[name]


def steps(work: Quantization, count: int = 3) -> None:
    """A few steps on the images."""
    optimizer = make_optimizer(TrainArgs(lr=0.01), work.weights, work.groups)
    work.use(optimizer, 1)
    work.on_epoch_begin(0)
    work.module.train()
    for _ in range(count):
        loss = F.cross_entropy(work.module(images()), torch.arange(16) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    work.module.eval()


@pytest.mark.parametrize("make", [Net, Attention, Twice])
def test_without_quantizers_it_is_the_float_model(make: type[nn.Module]) -> None:
    model = make()
    lowered = prepare_qat(capture(model.eval(), images(2)))
    torch.testing.assert_close(lowered(images()), model(images()))


@pytest.mark.parametrize("edges", ["all", "inputs"])
@pytest.mark.parametrize("make", [Net, Attention, Twice, Residual])
def test_what_trained_is_what_is_deployed(make: type[nn.Module], edges: str) -> None:
    work = quantization(make(), spec(edges=edges))
    steps(work)
    learned = work.convert()
    assert learned is not None
    with torch.no_grad():
        exact, trained = lower(*learned)(images(64)), work.module(images(64))
    # A code that is rounded once in training and twice by a kernel moves a logit by a step of a grid of 4 bits.
    grid = learned[1].layers["fc"].output
    assert grid is not None
    step = float(grid.qparams().scale) * 2 ** (grid.spec.bits - 4)
    assert float((exact - trained).abs().max()) <= 2.01 * step
    assert float((exact == trained).float().mean()) > 0.9 or float((exact - trained).abs().mean()) < 0.2 * step


@pytest.mark.parametrize("cls", ["LSQQuantizer", "QuantAwareTrainRangeLinearQuantizer", "DorefaQuantizer"])
def test_batch_norms_that_start_at_zero_train(cls: str) -> None:
    model = Net()
    work = quantization(model, spec(cls, bits_activations=8, bits_weights=8))
    nn.init.zeros_(model.bn2.weight)
    steps(work)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert model.bn2.weight.all()
    nn.init.zeros_(model.bn2.weight)
    nn.init.constant_(model.bn2.bias, 0.3)
    learned = work.convert()
    assert learned is not None
    with torch.no_grad():
        exact, trained = lower(*learned)(images(64)), work.module(images(64))
    grid = learned[1].layers["fc"].output
    assert grid is not None
    assert float((exact - trained).abs().max()) <= 2.01 * float(grid.qparams().scale)


@pytest.mark.parametrize(("make", "weight"), [(Net, "conv2.weight"), (Attention, "attention.in_proj_weight")])
def test_the_model_itself_trains(make: type[nn.Module], weight: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(quantization(model, spec()), 1)
    after = model.state_dict()
    assert not torch.equal(before[weight], after[weight])
    if isinstance(model, Net):
        assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])


def owners(work: Quantization, epoch: int) -> dict[str, str]:
    found = work._assignment_in(epoch)
    return {name: "float" if claim is None else claim.spec.component.cls for name, claim in found.items()}


def test_a_layer_belongs_to_the_quantizer_that_began_last() -> None:
    first = spec("PACTQuantizer", 1, {"fc": {"bits_weights": 0, "bits_activations": 0}})
    second = spec("LSQQuantizer", 3, {"conv.*": {"bits_weights": 2}}, bits_activations=0, bits_weights=0)
    work = quantization(Net(), first, second)
    assert set(owners(work, 0).values()) == {"float"}
    assert owners(work, 2)["conv2"] == "PACTQuantizer"
    assert owners(work, 2)["fc"] == "float"
    assert owners(work, 9)["conv2"] == "LSQQuantizer"
    assert owners(work, 9)["pre_bn"] == "PACTQuantizer"


def test_fewer_bits_from_an_epoch_on() -> None:
    work = quantization(Net(), spec(), spec(start=2, bits_weights=2))
    work.on_epoch_begin(0)
    before = layer(work, "conv2").weight
    work.on_epoch_begin(1)
    assert layer(work, "conv2").weight is before
    work.on_epoch_begin(2)
    assert len(layer(work, "conv2").rounded_weight()[0][0].unique()) <= 3
    assert work.plan is not None
    assert Plan(work.plan.layers) == work.plan


def test_only_what_leaves_a_relu_where_edges_say_so() -> None:
    work = quantization(Net(), spec("DorefaQuantizer", edges=None))
    work.on_epoch_begin(0)
    have = {name for name, each in trainable_layers(work.module) if each.output is not None}
    assert have == {"conv1", "pre_bn", "conv3"}
    assert all(isinstance(each, nn.Identity) for _, lay in trainable_layers(work.module) for each in lay.inputs)


def test_bits_of_the_first_and_the_last_layer() -> None:
    work = quantization(Net(), spec(bits_first_last=8))
    ((_, settings),) = work.settings
    bits = {name: (each.bits_weights, each.bits_activations) for name, each in settings.items()}
    assert bits["conv1"] == bits["fc"] == (8, 8)
    assert bits["conv2"] == (4, 4)
    assert bits["mean"][1] == 8


def test_bits_of_what_goes_through_no_relu() -> None:
    work = quantization(Net(), spec(bits_other_edges=8, rules={"mean": {"bits_activations": 6}}))
    bits = {name: each.bits_activations for name, each in work.settings[0][1].items()}
    assert {name for name, number in bits.items() if number == 8} == {"conv2", "add", "fc"}
    assert bits["conv1"] == bits["pre_bn"] == bits["conv3"] == 4
    assert bits["mean"] == 6


def test_bits_of_the_inputs_of_layers_with_weights() -> None:
    work = quantization(Net(), spec(edges="inputs", bits_first_last=8))
    ((_, settings),) = work.settings
    inputs = {name: each.of_input(0).bits_activations for name, each in settings.items() if each.input_overrides}
    assert inputs == {"conv1": 8, "conv2": 4, "conv3": 4, "fc": 8}
    outputs = {name: settings[name].bits_activations for name in ("conv1", "conv2", "conv3", "mean", "fc")}
    assert set(outputs.values()) == {8}
    assert settings["pre_bn"].bits_activations == settings["add"].bits_activations == 4, "a convolution alone reads it"
    work.on_epoch_begin(0)
    own = {name for name, each in trainable_layers(work.module) if not isinstance(each.inputs[0], nn.Identity)}
    assert own == {"conv1"}, "all others arrive on the bits that they want"


def test_an_input_that_a_relu_gives_is_one_of_a_relu() -> None:
    work = quantization(Residual(), spec("PACTQuantizer", edges="inputs"))
    work.on_epoch_begin(0)
    kinds = {name: isinstance(layer(work, name).inputs[0], ClippedActivation) for name in ("conv1", "conv2", "conv3")}
    assert kinds == {"conv1": False, "conv2": True, "conv3": False}


def test_a_layer_puts_what_others_read_too_on_a_grid_of_its_own() -> None:
    rules = {"conv2": {"bits_activations": 3}, "add": {"bits_activations": 6}}
    work = quantization(Residual(), spec(edges="inputs", bits_other_edges=7, rules=rules))
    steps(work)
    learned = work.convert()
    assert learned is not None
    plan = learned[1].layers
    assert [grid and grid.spec.bits for name in ("conv1", "conv2", "conv3") for grid in plan[name].inputs] == [4, 3, 4]
    outputs = {name: each.output.spec.bits for name, each in plan.items() if each.output is not None}
    assert outputs == {"conv1": 7, "conv2": 7, "conv3": 7, "add": 6, "add_1": 7, "mean": 4, "fc": 7}
    grid = layer(work, "conv2").inputs[0]
    assert isinstance(grid, LsqActivation)
    assert (grid.low, grid.high, grid.scale.requires_grad) == (0, 7, True)


def test_a_rule_for_the_first_layer_beats_its_bits() -> None:
    work = quantization(Net(), spec(rules={"conv1": {"bits_weights": 6}}, bits_first_last=8))
    assert work.settings[0][1]["conv1"].bits_weights == 6


def test_images_in_float() -> None:
    cls, modes = "QuantAwareTrainRangeLinearQuantizer", {"mode_activations": "asym_u", "mode_weights": "sym"}
    work = quantization(Net(), spec(cls, quantize_inputs=False, **modes))
    work.on_epoch_begin(0)
    assert isinstance(layer(work, "conv1").inputs[0], nn.Identity)
    with_inputs = quantization(Net(), spec(cls, num_bits_inputs=8, **modes))
    with_inputs.on_epoch_begin(0)
    assert layer(with_inputs, "conv1").inputs[0].params.spec.bits == 8  # type: ignore[union-attr]


def test_dampening_is_the_distance_to_the_grid() -> None:
    work = quantization(Net(), spec(dampening=0.5))
    work.on_epoch_begin(0)
    losses = work.before_backward(
        Batch(0, 0, [], images(), torch.zeros(16)), torch.zeros(16, 5), Losses(torch.tensor(1.0), torch.tensor(1.0))
    )
    expected = 0.0
    for _, each in trainable_layers(work.module):
        if each.weight is not None:
            weight, (rounded, scale) = each.module.weight, map(torch.detach, each.rounded_weight())
            assert isinstance(weight, Tensor)
            weight = weight.detach()
            near = (weight - rounded).abs() <= scale.view(-1, *[1] * (weight.ndim - 1)) / 2
            expected += float((weight - rounded)[near].square().sum())
    assert losses.overall.item() == pytest.approx(1 + 0.5 * expected, rel=1e-5)
    assert losses.others["Dampening Loss"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_frozen_statistics() -> None:
    work = quantization(Net(), spec(freeze_bn_epoch=1))
    for epoch, training in ((0, True), (1, False)):
        work.module.train()
        work.on_epoch_begin(epoch)
        norm = layer(work, "conv1").norm
        assert norm is not None
        assert norm.training is training


def test_groups_of_the_optimizer_follow_the_quantizers() -> None:
    work = quantization(Net(), spec(lr_factor=0.1), spec("PACTQuantizer", 1, act_clip_decay=0.01))
    optimizer = make_optimizer(TrainArgs(lr=1.0), work.weights, work.groups)
    work.use(optimizer, 1)
    assert [len(group["params"]) for group in optimizer.param_groups[1:]] == [0, 0]
    work.on_epoch_begin(0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1, 1.0]
    scales = len(optimizer.param_groups[1]["params"])
    assert scales > 8
    work.on_epoch_begin(1)
    assert len(optimizer.param_groups[1]["params"]) == 0
    assert optimizer.param_groups[2]["weight_decay"] == 0.01


def test_the_state_restores_every_quantizer() -> None:
    work = quantization(Net(), spec(), spec("LSQPlusQuantizer", 1, {"fc": {"bits_weights": 0, "bits_activations": 0}}))
    steps(work)
    work.on_epoch_begin(1)
    state = work.state_dict()
    other = quantization(Net(), spec(), spec("LSQPlusQuantizer", 1, {"fc": {"bits_weights": 0, "bits_activations": 0}}))
    other.graph.load_state_dict(work.graph.state_dict())
    other.load_state_dict(state)
    torch.testing.assert_close(other.module.eval()(images()), work.module.eval()(images()), rtol=0, atol=0)


def test_too_few_bits_for_a_method() -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml:2: bits_weights of 'conv1' is 1, but LSQQuantizer needs 2 or more"):
        quantization(Net(), spec(bits_weights=1))


def test_a_relu_has_no_bits_of_its_own_where_inputs_have_them() -> None:
    rules = {"relu.*": {"bits_activations": 6}}
    quantization(Net(), spec(rules=rules))
    expected = (
        r"a\.yaml:5: 'relu\.\*' matches ReLUs and batch-norms alone, which have no bits under edges: inputs; name"
    )
    with pytest.raises(ConfigError, match=expected):
        quantization(Net(), spec(rules=rules, edges="inputs"))


def test_all_mistakes_of_all_quantizers_at_once() -> None:
    wrong = spec(rules={"conv9": {"bits_weights": 2}}), spec("PACTQuantizer", rules={"fcc": {"bits_weights": 2}})
    with pytest.raises(ConfigError) as caught:
        quantization(Net(), *wrong)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "a.yaml:5: 'conv9' matches no layer",
        "a.yaml:5: 'fcc' matches no layer",
    ]


class Dropping(nn.Module):
    """Dropout behind a layer, in a branch, before a ReLU, where it is not kept, and one that never drops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.drop1 = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout2d(0.5)
        self.conv2, self.depth = nn.Conv2d(8, 8, 1), StochasticDepth(0.5, "row")
        self.conv3, self.drop3, self.never = nn.Conv2d(8, 8, 1), nn.Dropout(0.5), nn.Dropout(0.0)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(F.relu(self.conv1(x)))
        x = self.never(F.relu(self.drop3(self.conv3(x + self.depth(self.conv2(x))))))
        return self.fc(F.dropout(x.mean((2, 3)), 0.3, self.training))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda x, training: F.dropout(input=x, p=0.25, training=training), nn.Dropout),
        (lambda x, training: F.dropout(x, 0.25, training), nn.Dropout),
        (lambda x, training: F.dropout1d(x.flatten(2), 0.25, training).reshape(x.shape), nn.Dropout1d),
        (lambda x, training: F.dropout2d(x, p=0.25, training=training), nn.Dropout2d),
        (lambda x, training: F.alpha_dropout(x, 0.25, training), nn.AlphaDropout),
    ],
)
def test_dropout_that_is_called_as_a_function(call: Any, kind: type[nn.Module]) -> None:
    class Calling(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = call(self.conv(x), self.training)
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    graph = capture(Calling(), images(2), share=True)
    found = [module for module in graph.modules() if isinstance(module, DROPOUTS)]
    assert [type(module) for module in found] == [kind]
    assert found[0].p == 0.25
    kept = capture(Calling(), images(2))
    assert not any(isinstance(module, DROPOUTS) for module in kept.modules())
    assert sorted(name for name, _ in kept.named_modules() if name) == ["conv", "fc", "mean"]


def test_dropout_trains_and_is_not_deployed() -> None:
    work = quantization(Dropping(), spec())
    modules = [work.module.get_submodule(str(n.target)) for n in work.module.graph.nodes if n.op == "call_module"]
    kept = [type(module).__name__ for module in modules if isinstance(module, DROPOUTS)]
    assert kept == ["Dropout2d", "StochasticDepth", "Dropout"]
    steps(work)
    work.module.train()
    with torch.no_grad():
        assert not torch.equal(work.module(images()), work.module(images()))
        work.module.eval()
        assert torch.equal(work.module(images()), work.module(images()))
    learned = work.convert()
    assert learned is not None
    graph, plan = learned
    assert not any(isinstance(module, DROPOUTS) for module in graph.modules())
    folded = capture(Dropping().eval(), images(2))
    assert [node.name for node in folded.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert lower(graph, plan)(images()).shape == (16, 5)
