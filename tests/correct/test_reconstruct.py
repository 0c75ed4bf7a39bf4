"""Reconstruction: units, soft rounding, streams, and what AdaRound, BRECQ and QDrop make of small models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import planned
from torch import Tensor, fx, nn

from qlib.checkpoint.corrected import load_weights, save_weights
from qlib.correct._base import CalibrationImages
from qlib.correct._reconstruct import Options, RandomMask, _some_images, reconstruct
from qlib.correct._soft_rounding import SoftRounding
from qlib.correct._stream import Buffer, Stream
from qlib.correct._units import block_units, layer_units, unit_module
from qlib.correct.adaround import adaround
from qlib.correct.brecq import brecq
from qlib.correct.gptq import _round_layer, gptq, round_rows
from qlib.correct.qdrop import qdrop
from qlib.errors import ConfigError
from qlib.graph import Graph, capture
from qlib.graph.ir import layers, name_of
from qlib.lower import lower
from qlib.lower.fake import FakeLayer, FakeWeight, lower_fake
from qlib.quant.affine import qparams_from_range, range_of_grid
from qlib.quant.plan import LayerPlan, Plan, WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.tensor_file import read_tensors, write_tensors


def images_of(images: Tensor, folder: Path, batch: int = 4) -> CalibrationImages:
    return CalibrationImages(lambda: iter(torch.split(images, batch)), len(images), torch.device("cpu"), folder, seed=0)


def test_blocks_of_a_residual_network() -> None:
    graph, _, _ = planned("resnet20_cifar", 8, 8)
    units = block_units(graph)
    assert [unit.name for unit in units] == [
        "relu",
        *(f"layer{stage}.{block}.relu2" for stage in (1, 2, 3) for block in (0, 1, 2)),
        "fc",
    ]
    assert all(len(unit.inputs) == 1 for unit in units)
    assert [node.name for unit in units for node in unit.nodes] == [
        node.name for node in graph.graph.nodes if node.op not in ("placeholder", "output")
    ]


@pytest.mark.parametrize("arch", ["resnet20_cifar", "shufflenet_v2_x1_0", "mobilenet_v2"])
def test_blocks_compute_the_whole(arch: str) -> None:
    graph, _, images = planned(arch, 8, 8)
    values: dict[str, Tensor] = {next(node.name for node in graph.graph.nodes): images[:2]}
    with torch.inference_mode():
        for unit in block_units(graph):
            part = unit_module(graph, unit)
            values[unit.output.name] = part(*(values[source.name] for source in unit.inputs))
        assert torch.allclose(values[unit.output.name], graph(images[:2]), atol=1e-5)


def test_layer_units_hold_each_weight_once() -> None:
    graph, plan, _ = planned("resnet20_cifar", 8, 8)
    weighted = [name_of(node) for node, _ in layers(graph) if plan.layers[name_of(node)].weight is not None]
    assert [str(unit.nodes[0].meta["name"]) for unit in layer_units(graph)] == weighted


def test_a_stream_keeps_what_is_still_used_in_memory_or_on_disk(tmp_path: Path) -> None:
    graph, _, images = planned("digits_cnn", 8, 8)
    for limit in (2**40, 0):
        with Buffer(tmp_path, limit) as buffer:
            stream = Stream(graph, torch.split(images, 4), buffer)
            nodes = list(graph.graph.nodes)[:-1]
            for node in nodes:
                stream.advance(node)
            assert torch.allclose(torch.cat(stream[nodes[-1]]), graph(images), atol=1e-6)
            assert (buffer.files > 0) == (limit == 0)
            with pytest.raises(KeyError):
                stream[nodes[1]]
        assert not list(tmp_path.iterdir())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["sym", "asym_s", "sym_restr", "asym_u"]), st.integers(2, 8))
def test_soft_rounding_starts_at_the_float_weight_and_ends_next_to_it(seed: int, mode: str, bits: int) -> None:
    layer = nn.Conv2d(3, 4, 3)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data.normal_(generator=generator)
    rounding = FakeWeight(layer, WeightPlan(QuantSpec.of_mode(mode, bits, 0)))
    soft = SoftRounding(rounding, layer.weight)
    codes = layer.weight / rounding.scale
    inside = (codes >= rounding.low) & (codes <= rounding.high)
    assert bool(((soft(layer.weight) - layer.weight).abs() <= 0.011 * rounding.scale)[inside].all())
    soft.v.data.normal_(generator=generator)
    soft.hard = True
    hard = soft(layer.weight)
    assert torch.allclose(rounding(hard), hard, atol=1e-7)  # on the grid
    assert bool(((hard - layer.weight).abs() <= rounding.scale * 1.0001)[inside].all())


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
def test_the_range_of_a_grid_gives_that_grid(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = -torch.rand(2000, generator=generator), torch.rand(2000, generator=generator) * 3
    grid = qparams_from_range(low, high, QuantSpec.of_mode(mode, 5, axis=0))
    assert qparams_from_range(*range_of_grid(grid), grid.spec).same_grid(grid)


def block_errors(graph: Graph, plan: Plan, images: Tensor) -> float:
    """The squared error of the fake model's output."""
    with torch.inference_mode():
        return float((lower_fake(graph, plan)(images) - graph(images)).square().mean())


METHODS = {"adaround": adaround, "brecq": brecq, "qdrop": qdrop}


@pytest.mark.parametrize("method", METHODS)
def test_reconstruction_lowers_the_error_and_the_plan_gives_the_same_integers(method: str, tmp_path: Path) -> None:
    graph, plan, images = planned("digits_cnn", 4, 3)
    original = copy.deepcopy(graph)
    with torch.inference_mode():
        reference = original(images)
        before = float((lower(graph, plan)(images) - reference).square().mean())
    fresh = METHODS[method](graph, plan, images_of(images, tmp_path), 60)
    with torch.inference_mode():
        after = float((lower(graph, fresh)(images) - reference).square().mean())
        assert after < 0.95 * before
        assert torch.equal(lower(graph, fresh)(images).argmax(1), lower_fake(graph, fresh)(images).argmax(1))
    assert not list(tmp_path.iterdir())
    for node, module in layers(graph):
        weight = fresh.layers[name_of(node)].weight
        if weight is not None:  # on its grid, next to the float weight
            assert isinstance(module.weight, Tensor)
            grid = FakeWeight(module, weight)
            assert torch.allclose(grid(module.weight), module.weight, atol=1e-6)
            was = original.get_submodule(str(node.target)).weight
            assert isinstance(was, Tensor)
            assert bool(((module.weight - was).abs() <= 1.001 * grid.scale).all())


def test_a_broken_reconstruction_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third part, and called again: the first two are not learned again, and the end is the same."""
    import qlib.correct._reconstruct as module

    optimize, seen = module._optimize, list[int]()

    def counted(part: fx.GraphModule, *args: object) -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        optimize(part, *args)  # type: ignore[arg-type]

    options = Options(5, learn_scales=True, drop=0.5)
    whole, plan, images = planned("digits_cnn", 4, 4)
    expected = reconstruct(whole, plan, block_units(whole), images_of(images, tmp_path), options)
    graph, plan, images = planned("digits_cnn", 4, 4)
    monkeypatch.setattr(module, "_optimize", counted)
    units = len(block_units(graph))
    with pytest.raises(KeyboardInterrupt):
        reconstruct(graph, plan, block_units(graph), images_of(images, tmp_path), options)
    assert reconstruct(graph, plan, block_units(graph), images_of(images, tmp_path), options) == expected
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in graph.state_dict().items())
    assert len(seen) == 3 + units - 2
    assert not list(tmp_path.iterdir())


class _Twice(nn.Module):
    """One layer that is called twice, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.once(self.again(self.again(x).relu()).relu())
        return y


def test_a_layer_that_is_called_twice_keeps_the_nearest_codes(tmp_path: Path) -> None:
    """Each call would choose for itself, and the second undo what the first chose."""
    torch.manual_seed(0)
    images = torch.randn(16, 6)
    graph = capture(_Twice(), images[:2])
    weight = WeightPlan(QuantSpec.of_mode("sym", 3))
    plan = Plan(
        {name: LayerPlan("linear", (None,), weight) for name in ("again", "again_1", "once")}
        | {name: LayerPlan("relu", (None,)) for name in ("relu", "relu_1")}
    )
    once = graph.get_submodule("once")
    nearest = FakeWeight(once, weight)(once.weight)
    float_weight = graph.get_submodule("again").weight.detach().clone()
    adaround(graph, plan, images_of(images, tmp_path), 200)
    assert torch.equal(graph.get_submodule("again").weight, float_weight)  # rounded to nearest when it is lowered
    assert not torch.allclose(once.weight, nearest)
    save_weights(tmp_path / "w.safetensors", graph, "c0ffee")
    load_weights(tmp_path / "w.safetensors", graph, "c0ffee")
    assert torch.equal(graph.get_submodule("again").weight, float_weight)


def test_gptq_of_a_layer_that_is_called_twice_makes_up_for_nothing_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 6)
    graph = capture(_Twice(), images[:2])
    weight = WeightPlan(QuantSpec.of_mode("sym", 3))
    plan = Plan(
        {name: LayerPlan("linear", (None,), weight) for name in ("again", "again_1", "once")}
        | {name: LayerPlan("relu", (None,)) for name in ("relu", "relu_1")}
    )
    alone = copy.deepcopy(graph)
    fake = lower_fake(alone, plan)
    layer = next(m for m in fake.modules() if isinstance(m, FakeLayer))
    assert isinstance(layer.weight, FakeWeight)
    with torch.no_grad():
        _round_layer(layer, layer.weight, [(images, images)])
    gptq(graph, plan, images_of(images, tmp_path))
    again = graph.get_submodule("again")
    torch.testing.assert_close(again.weight, layer.module.weight)
    torch.testing.assert_close(again.bias, layer.module.bias)


@pytest.mark.parametrize(
    ("shapes", "images"),
    [
        pytest.param([(32, 4, 32, 32)], 32, id="maps of CIFAR"),
        pytest.param([(32, 4, 55, 55), (32, 8, 27, 27)], 10, id="larger ones"),
        pytest.param([(32, 4, 27, 27), (32, 4, 55, 55)], 10, id="inputs count"),
        pytest.param([(4, 2, 224, 224)], 1, id="one at least"),
        pytest.param([(32, 4096)], 32, id="rows"),
        pytest.param([(32, 197, 768)], 32, id="sequences"),
        pytest.param([(32, 4, 55, 55), (1, 4, 55, 55)], 32, id="an input of another batch"),
    ],
)
def test_a_step_looks_at_so_many_images(shapes: list[tuple[int, ...]], images: int) -> None:
    tensors = [torch.empty(1).expand(shape) for shape in shapes]
    assert len(tensors[0][_some_images(tensors)]) == images


def test_random_masks_have_the_share_and_the_layout() -> None:
    torch.manual_seed(0)
    like = torch.zeros(8, 16, 10, 10).to(memory_format=torch.channels_last)
    mask = RandomMask(0.25)
    first, second = mask(like), mask(like)
    assert first.stride() == like.stride()
    assert not torch.equal(first, second)
    assert 0.23 < float(first.float().mean()) < 0.27


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_gptq_is_better_than_nearest_rounding_on_its_objective(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 12, generator=generator).double() @ torch.randn(12, 200, generator=generator).double()
    rows = torch.randn(6, 12, generator=generator)
    ones = torch.ones(6, 1)
    rounded = round_rows(rows, x @ x.T, 0.4 * ones, -8 * ones, 7 * ones)
    nearest = torch.clamp((rows / 0.4).round(), -8, 7) * 0.4
    assert torch.allclose((rounded / 0.4).round() * 0.4, rounded, atol=1e-5)

    def error(weights: Tensor) -> float:
        return float(((weights - rows).double() @ x).square().sum())

    assert error(rounded) < error(nearest)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 0))
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2, padding_mode="circular")
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.grouped(self.plain(x).relu()).mean((2, 3)))
        return y


def test_gptq_hessians_are_those_of_the_layers_inputs() -> None:
    """``|W x|^2`` from the Hessian, for every weight, is the sum of squares of the layer's output without its bias."""
    from qlib.stats.gram import gram

    torch.manual_seed(0)
    x = torch.randn(3, 8, 9, 8)
    for layer in (
        nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), bias=False),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2, padding_mode="circular", bias=False),
        nn.Conv2d(8, 8, (1, 3), groups=8, bias=False),
        nn.Linear(8, 5, bias=False),
    ):
        hessian = gram(layer, x)
        rows = layer.weight.detach().flatten(1).unflatten(0, (len(hessian), -1)).double()
        squares = torch.einsum("goi,gij,goj->go", rows, hessian, rows).flatten()
        axes = (0, 1, 2) if isinstance(layer, nn.Linear) else (0, 2, 3)
        assert torch.allclose(squares, layer(x).double().square().sum(axes), rtol=1e-4)


@pytest.mark.parametrize("count", [pytest.param(64, id="many positions"), pytest.param(2, id="few")])
def test_gptq_makes_up_for_errors_of_its_inputs_where_they_are_known_well(count: int) -> None:
    """A layer whose inputs arrive at 0.8 of their size gets weights of 1.25 times theirs, and the bias of the mean."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 2, 1), torch.rand(1, 3, 1, count) + 1.0
    weight, exact = layer.weight.detach().clone(), layer(x)
    fake = FakeLayer(layer, LayerPlan("conv", (), WeightPlan(QuantSpec.of_mode("sym", 16, axis=0))), None, None)
    assert isinstance(fake.weight, FakeWeight)
    fake.weight.scale.data *= 1.5  # room for the larger weights
    with torch.no_grad():
        _round_layer(fake, fake.weight, [(x, 0.8 * x)])
    factor = 1.25 if count == 64 else 1.0
    assert torch.allclose(layer.weight, factor * weight, rtol=0.02)
    assert torch.allclose(layer(0.8 * x).mean((0, 2, 3)), exact.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("acts", [0, 4])
def test_gptq_lowers_the_error_of_a_model(acts: int, tmp_path: Path) -> None:
    graph, plan, images = planned("digits_cnn", acts, 3)
    reference = copy.deepcopy(graph)(images)
    with torch.inference_mode():
        before = float((lower(graph, plan)(images) - reference).square().mean())
        fresh = gptq(graph, plan, images_of(images, tmp_path))
        assert float((lower(graph, fresh)(images) - reference).square().mean()) < 0.7 * before


@pytest.mark.parametrize("rounding", [gptq, adaround, brecq, qdrop])
def test_pruned_weights_stay_zero(rounding: Callable[..., Plan], tmp_path: Path) -> None:
    graph, plan, images = planned("digits_cnn", 4, 4)
    zeros = {}
    for node, module in layers(graph):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data.flatten()[::2] = 0.0
            zeros[name_of(node)] = module.weight == 0
    steps = {} if rounding is gptq else {"iterations": 5}
    rounding(graph, plan, images_of(images, tmp_path), **steps)
    for node, module in layers(graph):
        if name_of(node) in zeros:
            assert torch.equal(module.weight[zeros[name_of(node)]], torch.zeros(int(zeros[name_of(node)].sum())))
            assert float((module.weight != 0).float().mean()) > 0.2


def test_corrected_weights_are_read_back_and_belong_to_one_model(tmp_path: Path) -> None:
    graph, plan, images = planned("digits_cnn", 4, 4)
    other, _, _ = planned("digits_cnn", 4, 4)
    fresh = brecq(graph, plan, images_of(images, tmp_path), 3)
    file = tmp_path / "w.safetensors"
    save_weights(file, graph, "c0ffee")
    load_weights(file, other, "c0ffee")
    assert torch.equal(lower(other, fresh)(images), lower(graph, fresh)(images))
    with pytest.raises(ConfigError, match=r"w\.safetensors are of another model; quantize this one again"):
        load_weights(file, other, "beef")
    tensors, texts = read_tensors(file)
    misfits = {"fc.weight": tensors["fc.weight"][:1]}, {"relu.bias": torch.zeros(1)}
    for wrong in ({"fc.bias": tensors["fc.bias"]}, *({**tensors, **each} for each in misfits)):
        write_tensors(file, wrong, "weights", texts)
        with pytest.raises(ConfigError, match=r"w\.safetensors do not fit the model; quantize it again"):
            load_weights(file, other, "c0ffee")
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be read: .*; keep it beside the plan"):
        load_weights(file, other, "c0ffee")
