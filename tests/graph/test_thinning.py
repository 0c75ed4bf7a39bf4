"""Thinning: a graph without some channel classes computes what it computes with zeros in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from thinnable import CASES, IMAGES
from torch import nn
from whole_path import plan_eight_bits

from qlib.deploy.export import export_quantized
from qlib.deploy.verify import verify
from qlib.errors import CheckpointError, ModelError
from qlib.graph import Graph, fold_batch_norm
from qlib.graph.capture import capture
from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.graph.coordinates_cost import class_costs
from qlib.graph.cost import layer_macs
from qlib.graph.ir import layers, name_of
from qlib.lower import exact_arithmetic, lower
from qlib.surgery.thin import masked, recipe_of, replay, thin
from qlib.surgery.thin_plan import thin_plan

MODELS = [pytest.param(case.values[0], id=case.id) for case in CASES if case.values[1]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def captured(make: Callable[[], nn.Module]) -> Graph:
    """A model whose batch-norms do something, captured."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return capture(model, torch.zeros(IMAGES))


def every_other(classes: ChannelClasses) -> list[int]:
    """The first, third, ... class of each row: one stays of each axis."""
    return [number for numbers, _ in classes.rows() for number in numbers[:-1][::2]]


def thin_on(small: Graph, before: ChannelClasses, removed: list[int]) -> Graph:
    """A thinned graph without classes that it had before it was thinned, whose numbers have changed."""
    now, kept = channel_classes(small), {(each.name, each.axis): each.kept for each in recipe_of(small).entries}
    found = set()
    for name, axis, indices in (entry for number in removed for entry in before.entries(number)):
        places = [kept[name, axis].index(i) for i in indices] if (name, axis) in kept else indices
        found |= {int(now.of(name, axis)[place]) for place in places}
    return thin(small, found)


def shapes(graph: Graph) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in graph.state_dict().items()}


def images() -> torch.Tensor:
    return torch.randn(3, *IMAGES[1:])


@pytest.mark.parametrize("make", MODELS)
def test_masked_is_thinned(make: Callable[[], nn.Module]) -> None:
    graph, x = captured(make), images()
    classes = channel_classes(graph)
    removed = every_other(classes)
    small, zeroed = thin(graph, removed), copy.deepcopy(graph)
    zeroed.load_state_dict(masked(graph.state_dict(), classes, removed))
    if classes.neutral.all():
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-5, atol=1e-6)
    costs, keep = class_costs(graph, classes), classes.keeps(removed)
    assert sum(each.numel() for each in small.parameters()) == costs.total_parameters(keep)
    assert sum(filter(None, layer_macs(small).values())) == costs.total_macs(keep)
    assert [name_of(node) for node, _ in layers(small)] == [name_of(node) for node, _ in layers(graph)]


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS)
def test_masked_is_thinned_to_the_bit_in_integers(
    make: Callable[[], nn.Module], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph, x = captured(make), torch.randn(4, *IMAGES[1:])
    folded = fold_batch_norm(graph)
    classes = channel_classes(graph)
    removed = every_other(classes)
    small, zeroed = thin(graph, removed, classes), copy.deepcopy(graph)
    zeroed.load_state_dict(masked(graph.state_dict(), classes, removed))
    plan = plan_eight_bits(zeroed, folded, x)
    lowered = lower(small, thin_plan(plan, graph, classes, classes.keeps(removed)))
    with exact_arithmetic():
        expected, found = lower(zeroed, plan)(x), lowered(x)
    assert len(expected.unique()) > 2
    if classes.neutral.all():
        assert torch.equal(found, expected)
    if request.node.callspec.id in ("heads", "a group is a class"):  # an export takes its time
        export_quantized(lowered, x[:2], tmp_path / "model.onnx", opset=20, metadata={})
        assert verify(lowered, tmp_path / "model.onnx", [x]).exact


@pytest.mark.parametrize("make", MODELS)
def test_thin_nothing_thin_twice_and_replay(make: Callable[[], nn.Module]) -> None:
    graph, x = captured(make), images()
    classes = channel_classes(graph)
    removed = every_other(classes)
    same = thin(graph, [])
    torch.testing.assert_close(same(x), graph(x), rtol=0, atol=0)
    assert not recipe_of(same).entries
    whole = thin(graph, removed)
    second = thin_on(thin(graph, removed[::2]), classes, removed[1::2])
    for other in (second, replay(captured(make), recipe_of(whole))):
        assert set(recipe_of(other).entries) == set(recipe_of(whole).entries)
        assert {n: v.shape for n, v in other.state_dict().items()} == {
            n: v.shape for n, v in whole.state_dict().items()
        }
    torch.testing.assert_close(second(x), whole(x), rtol=0, atol=0)


def test_a_layer_keeps_one_channel() -> None:
    graph = captured(CASES[0].values[0])
    with pytest.raises(ModelError) as error:
        thin(graph, [1, 2, 3, 4])
    assert str(error.value) == "layer 'a' would be left without channels; at least one of them must stay"


def test_a_recipe_of_another_model_is_refused() -> None:
    graph = captured(CASES[0].values[0])
    small = thin(graph, [1, 2])
    with pytest.raises(CheckpointError) as error:
        replay(small, recipe_of(small))
    assert str(error.value) == (
        "the thinning recipe is for another model: 'a.weight' has 2 indices on axis 0, of 4; it is thinned"
        " already; give the -a that the checkpoint was made with"
    )
    with pytest.raises(CheckpointError, match=r"'norm\.weight' is no tensor of the model"):
        replay(captured(CASES[1].values[0]), recipe_of(small))
