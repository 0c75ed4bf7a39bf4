"""LAPQ: replayed graphs, ranges as coordinates, the objective, the search, and the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import finish, good, run, start
from torch import Tensor, nn

from qlib.config.flags.groups import LapqArgs
from qlib.config.layers.settings import LayerSettings
from qlib.errors import UsageError
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.lower import lower
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.affine import dequantize, quantize
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.search.lapq import search_ranges
from qlib.search.least_error import least_error, mean_error
from qlib.search.objective import Objective
from qlib.search.ranges import Coordinate, coordinates_of, scaled_plan, with_explicit_weights
from qlib.search.replay import FLOAT, OUTPUT, WEIGHT, QuantState, Replay, rounded, rounded_weight
from qlib.search.score import Scorer
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
BATCHES = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])]


class Net(nn.Module):
    """Residual, in-place ReLU, concatenation, a tensor used twice, a functional op that asks for a shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x) + x)
        x = torch.cat([F.avg_pool2d(self.up(x), 2), x], 1)
        return self.fc(x.mean((2, 3)).view(x.size(0), -1))


def graph_and_plan(bits: int = 4, **settings: Any) -> tuple[Graph, Plan]:
    graph = capture(Net(), IMAGES[:2])
    folded = fold_batch_norm(graph)
    graph = graph.to(memory_format=torch.channels_last)
    collector = Collector(graph)
    collector.update(IMAGES)
    each = LayerSettings(bits_activations=bits, bits_weights=bits, mode_activations="asym_u", mode_weights="sym_restr")
    every = {info.name: replace(each, **settings) for info in layer_infos(graph)}
    return graph, plan_post_train_linear(graph, every, ModelStats(collector.result()), folded)


def logits(replay: Replay, point: QuantState, cut: int, images: Tensor = IMAGES) -> Tensor:
    state = replay.run(replay.start(images), 0, cut, point)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    result = replay.logits(replay.run(state, cut, replay.end, point))
    assert all(torch.equal(state[key], value) for key, value in before.items() if isinstance(value, Tensor))
    return result


def test_a_graph_can_be_replayed_from_every_step() -> None:
    graph, plan = graph_and_plan()
    replay, point = Replay(graph), QuantState.of(graph, plan)
    with torch.inference_mode():
        expected = graph(IMAGES)
    assert torch.equal(logits(replay, FLOAT, 0), expected)
    quantized = logits(replay, point, 0)
    assert not torch.equal(quantized, expected)
    for cut in range(replay.end + 1):
        assert torch.equal(logits(replay, FLOAT, cut), expected)
        assert torch.equal(logits(replay, point, cut), quantized)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_replayed_plan_computes_what_the_exact_lowering_does(per_channel: bool) -> None:
    graph, plan = graph_and_plan(8, per_channel_wts=per_channel)
    replay, step = Replay(graph), plan.layers["fc"].output
    assert step is not None
    exact = lower(graph, plan)(IMAGES)
    found = logits(replay, QuantState.of(graph, plan), 0)
    assert float((found - exact).abs().max()) <= 1.01 * float(step.qparams().scale)  # a rounding tie, if at all


@given(st.sampled_from(["sym", "sym_restr", "asym_s", "asym_u"]), st.integers(2, 8), st.floats(-3, 0), st.floats(0, 3))
@settings(deadline=None, max_examples=50)
def test_rounding_is_quantizing_and_back(mode: str, bits: int, low: float, high: float) -> None:
    from qlib.lower.base import ActivationGrid

    params = TensorPlan(QuantSpec.of_mode(mode, bits), min=low, max=high).qparams()
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(rounded(x, ActivationGrid.of(params)), dequantize(quantize(x, params), params))


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3), nn.Linear(5, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_a_weight_keeps_its_layout(module: nn.Module) -> None:
    found = rounded_weight(module, WeightPlan(QuantSpec.of_mode("sym_restr", 8, 0)))
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach()
    assert found.shape == weight.shape
    assert float((found - weight).abs().max()) <= float(weight.abs().max()) / 127 / 2 * 1.001


def test_coordinates_are_in_execution_order_and_shared_grids_move_together() -> None:
    graph, plan = graph_and_plan()
    explicit = with_explicit_weights(graph, plan)
    assert lower(graph, explicit)(IMAGES).equal(lower(graph, plan)(IMAGES))
    coordinates = coordinates_of(graph, explicit, both_ends=False)
    slots = [slot for each in coordinates for slot in each.slots]
    assert len(set(slots)) == len(slots)
    assert ("conv1", 0) in slots
    assert ("conv1", WEIGHT) in slots
    replay = Replay(graph)
    positions = [min(replay.position(slot) for slot in each.slots) for each in coordinates]
    assert positions == sorted(positions)
    concat = next(name for name, layer in plan.layers.items() if layer.kind == "concat")
    sharing = [name for name, layer in plan.layers.items() if layer.output == plan.layers[concat].output]
    (shared,) = [each for each in coordinates if (concat, OUTPUT) in each.slots]
    assert {name for name, _ in shared.slots} == set(sharing)
    assert len(sharing) == 2
    both = coordinates_of(graph, explicit, both_ends=True)
    assert len(both) > len(coordinates)
    assert {each.end for each in both} == {"both", "min", "max"}


def test_softmax_and_exact_weights_stay() -> None:
    layer = LayerPlan("softmax", output=TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=255 / 256))
    graph = capture(nn.Sequential(nn.Softmax(-1)), torch.zeros(2, 5))
    assert coordinates_of(graph, Plan({"0": layer}), both_ends=True) == []


def test_unmoved_ranges_are_the_plan_and_moved_ones_follow() -> None:
    graph, plan = graph_and_plan()
    explicit = with_explicit_weights(graph, plan)
    coordinates = coordinates_of(graph, explicit, both_ends=True)
    assert scaled_plan(explicit, coordinates, np.zeros(len(coordinates))) == explicit
    image = coordinates.index(Coordinate((("conv1", 0),), "min"))
    values = np.zeros(len(coordinates))
    values[image] = -4.0
    before, after = (
        explicit.layers["conv1"].inputs[0],
        scaled_plan(explicit, coordinates, values).layers["conv1"].inputs[0],
    )
    assert before is not None
    assert before.min is not None
    assert after == replace(before, min=before.min / 2, clip="lapq")


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-6, 3)), min_size=1, max_size=12), st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_objective_depends_on_the_values_alone(moves: list[tuple[int, float]], both_ends: bool) -> None:
    """Whatever was evaluated before: a score is that of the moved plan, computed from the images."""
    coordinates = coordinates_of(GRAPH, EXPLICIT, both_ends)
    objective = Objective(GRAPH, EXPLICIT, coordinates, BATCHES)
    scorer, values = Scorer(GRAPH, BATCHES), np.zeros(len(coordinates))
    for index, value in moves:
        values[index % len(coordinates)] = value
        score = objective(values)
        assert score == scorer.score(QuantState.of(GRAPH, scaled_plan(EXPLICIT, coordinates, values))).divergence


GRAPH, PLAN = graph_and_plan()
EXPLICIT = with_explicit_weights(GRAPH, PLAN)


def score(plan: Plan) -> float:
    return Scorer(GRAPH, BATCHES).score(QuantState.of(GRAPH, plan)).divergence


@pytest.mark.parametrize(
    "args",
    [
        LapqArgs(maxfev=60),
        LapqArgs(maxiter=1, search_clipping=True),
        LapqArgs(method="nelder-mead", maxfev=80),
        LapqArgs(method="cobyla", maxfev=80),
        LapqArgs(basinhopping=True, basinhopping_niter=2, maxfev=30),
        LapqArgs(init_mode="l2", maxfev=30),
    ],
    ids=["powell", "both ends", "nelder-mead", "cobyla", "basinhopping", "l2"],
)
def test_a_search_is_never_worse_than_its_start_and_repeatable(args: LapqArgs) -> None:
    found = search_ranges(GRAPH, PLAN, BATCHES, args, seed=3)
    assert score(found) < score(PLAN)
    assert found == search_ranges(GRAPH, PLAN, BATCHES, args, seed=3)
    clips = {layer.output.clip for layer in found.layers.values() if layer.output is not None}
    assert clips <= {"none", "lapq"}


def test_a_search_that_finds_nothing_returns_the_plan() -> None:
    _, plan = graph_and_plan(16)
    assert search_ranges(GRAPH, plan, BATCHES, LapqArgs(maxfev=1, init_mode="none"), seed=0) == plan


def test_there_must_be_something_to_search() -> None:
    _, plan = graph_and_plan(0)
    with pytest.raises(UsageError, match=r"^--qe-lapq finds no range to search: all layers are left in float; let"):
        search_ranges(GRAPH, plan, BATCHES, LapqArgs(), seed=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("method", ["powell", "nelder-mead", "cobyla"])
def test_ranges_of_least_error_are_no_worse_for_their_tensor(p: float, method: str) -> None:
    coordinates = coordinates_of(GRAPH, EXPLICIT, both_ends=False)
    moved = scaled_plan(EXPLICIT, coordinates, least_error(GRAPH, EXPLICIT, coordinates, BATCHES, p, method))
    better = 0
    for name in ("conv1", "conv2", "up", "fc"):
        module, before, after = GRAPH.get_submodule(name), EXPLICIT.layers[name].weight, moved.layers[name].weight
        assert before is not None
        assert after is not None
        assert isinstance(module.weight, Tensor)
        errors = [mean_error(module.weight.detach(), rounded_weight(module, plan), p) for plan in (before, after)]
        assert errors[1] <= errors[0]
        better += errors[1] < errors[0]
    assert better


DIGITS = "-a digits_cnn --pretrained"
QUANTIZED = f"{DIGITS} --qe --qe-stats-file stats/digits_cnn_digits.yaml --qem asym_u --qeba 4 --qebw 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lapq")
    good(f"{DIGITS} --qe-calibration 0.2", folder)
    return folder


def test_a_run_as_a_user_runs_it(folder: Path) -> None:
    before = good(QUANTIZED, folder)
    process = start(f"{QUANTIZED} --qe-coordinate-search --lapq-maxiter 1 --lapq-images 96 -j 0", folder)
    after = finish(process, folder)
    assert (after.code, after.err) == (0, "")
    assert float(after.score()[2]) < 0.7 * float(before.score()[2])
    assert any(re.fullmatch(r"Iteration 20: Score=\d\.\d{6}", line) for line in after.lines)
    plan = after.folder / "layer_quant_params.yaml"
    assert "clip: lapq" in plan.read_text()
    again = good(f"{DIGITS} --qe --qe-config-file '{plan}'", folder)
    assert again.score() == after.score()
    repeated = good(f"{QUANTIZED} --qe-lapq --lapq-maxiter 1 --lapq-images 96", folder)
    assert (repeated.folder / "layer_quant_params.yaml").read_bytes() == plan.read_bytes()


@pytest.mark.parametrize("mode", ["AVG", "laplace", "L3"])
def test_a_search_starts_where_it_is_told_to(mode: str, folder: Path) -> None:
    done = good(f"{QUANTIZED} --qe-lapq --lapq-maxfev 3 --lapq-images 32 --lapq-init-mode {mode}", folder)
    text = (done.folder / "layer_quant_params.yaml").read_text()
    assert f"clip: {mode.lower()}" in text or mode == "L3"
    assert any("ranges of least L3 error" in line for line in done.lines) == (mode == "L3")


REFUSED = [
    ("start by statistics", "--lapq-init-mode avg", "--lapq-init-mode avg needs statistics, but --qe-config-file is a"),
    ("nothing to search", "--qeba 0 --qebw 0", "--qe-lapq finds no range to search: all layers are left in float"),
]


@pytest.mark.parametrize(("words", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused(words: str, sentence: str, folder: Path) -> None:
    made = good(QUANTIZED, folder)
    (folder / "plan.yaml").write_bytes((made.folder / "layer_quant_params.yaml").read_bytes())
    source = "--qe-config-file plan.yaml" if "init" in words else ""
    done = run(f"{DIGITS} --qe --qe-lapq {source} {words}", folder)
    assert done.code == 2
    assert done.err.startswith(f"compress.py: error: {sentence}")
    assert len(done.err.splitlines()) == 1
