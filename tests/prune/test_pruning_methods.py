"""Pruning without training: scores, choice, least squares and refit hold what they promise."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlib.config.flags.pruning import PRUNERS as FACTS
from qlib.errors import UsageError
from qlib.graph import capture
from qlib.prune import least_squares
from qlib.prune.choose import Pattern, choose_masks, choose_pattern
from qlib.prune.importance import output_importance
from qlib.prune.layers import chosen_layers, prunable_layers
from qlib.prune.least_squares import solve_masked
from qlib.prune.methods import obs as obs_module
from qlib.prune.methods._base import PRUNERS, Seen
from qlib.prune.methods.obs import removal_losses
from qlib.prune.refit import Repair, refit


def _moments(inputs: int, seed: int = 0) -> Tensor:
    x = torch.randn(4 * inputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x.T @ x / len(x)


def _error(weight: Tensor, other: Tensor, moments: Tensor) -> Tensor:
    off = (weight - other).double()
    return torch.einsum("oi,ij,oj->o", off, moments, off)


def test_losses_of_removals_add_up_to_the_error_of_the_best_weights_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The law of OBS: after each removal the rest is what least squares finds, and the losses sum to its error."""
    torch.manual_seed(0)
    weight, moments = torch.randn(5, 12), _moments(12) + 100 * torch.eye(12)
    monkeypatch.setattr(least_squares, "DAMPING", 1e-9)
    losses = removal_losses(weight, torch.linalg.inv(moments), torch.arange(12), 1)
    for gone in (1, 4, 7):
        removed = losses.argsort(1)[:, :gone]
        mask = torch.ones(5, 12, dtype=torch.bool).scatter_(1, removed, False)
        left = solve_masked(weight, moments, moments, mask)
        expected = losses.gather(1, removed).sum(1)
        assert torch.allclose(_error(weight, left, moments), expected, rtol=0.05), gone
    assert bool((losses.sort(1).values.diff() >= 0).all())


def test_obs_sees_that_an_input_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight whose input is another's twin goes before a small one that stands alone; in parts as well."""
    moments = torch.tensor([[1.0, 0.99, 0, 0], [0.99, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    weight = torch.tensor([[2.0, 2.1, 1.0, 1.2]])
    score = PRUNERS["obs"]
    assert int(score(weight, Seen(moments)).argmin()) == 0
    assert int(PRUNERS["wanda"](weight, Seen(moments)).argmin()) == 2
    whole = score(weight, Seen(moments))
    monkeypatch.setattr(obs_module, "_WORK", 16)  # parts of two inputs
    assert torch.allclose(score(weight, Seen(moments)), whole, rtol=0.05)
    doubled = score(weight, Seen(moments, importance=torch.tensor([2.0])))
    assert torch.allclose(doubled, 2 * score(weight, Seen(moments, importance=torch.tensor([1.0]))))


@pytest.mark.parametrize("method", FACTS)
def test_each_method_scores_each_weight(method: str) -> None:
    """Scores are finite, of the weight's shape; a weight of zero is among the first to go."""
    torch.manual_seed(1)
    weight = torch.randn(4, 8)
    weight[2, 5] = 0.0
    scores = PRUNERS[method](weight, Seen(_moments(8)))
    assert scores.shape == weight.shape
    assert scores.dtype == torch.float64
    assert bool(scores.isfinite().all())
    assert int(scores[2].argmin()) == 5


@pytest.mark.parametrize("method", FACTS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_keeps_n_of_each_m(method: str, pattern: str) -> None:
    torch.manual_seed(2)
    wanted, weight = Pattern.of(pattern), torch.randn(3, 16 * 4)
    group = wanted.groups(16, 4)
    scores = PRUNERS[method](weight, Seen(_moments(64), None, group, wanted.m - wanted.n))
    mask = choose_pattern(scores, group, wanted)
    kept = mask.view(3, 16 // wanted.m, wanted.m, 4).sum(2)
    assert bool((kept == wanted.n).all())


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_masks_have_the_level_and_are_nested(scope: str) -> None:
    torch.manual_seed(3)
    scores = {"a": torch.rand(4, 10), "b": torch.rand(2, 20)}
    before = {name: torch.ones_like(each, dtype=torch.bool) for name, each in scores.items()}
    for level in (0.1, 0.5, 0.9):
        masks = choose_masks(scores, level, scope)
        assert sum(int((~mask).sum()) for mask in masks.values()) == int(level * 80)
        assert not any(bool((mask & ~before[name]).any()) for name, mask in masks.items())
        before = masks


def test_conjugate_gradients_find_what_factors_find(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    weight, own, cross = torch.randn(6, 20), _moments(20), _moments(20, seed=5)
    mask = torch.rand(6, 20) > 0.4
    exact = solve_masked(weight, own, cross, mask)
    monkeypatch.setattr(least_squares, "_EXACT", 0)
    found = solve_masked(weight, own, cross, mask)
    assert torch.allclose(found, exact, rtol=1e-3, atol=1e-4)
    assert bool((exact[~mask] == 0).all())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.by_group = nn.Conv2d(8, 8, 3, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        features: Tensor = self.fc(self.by_group(x).mean((2, 3)))
        return features


def _net() -> _Net:
    torch.manual_seed(6)
    net = _Net().train()
    for _ in range(20):
        net(torch.randn(32, 3, 8, 8))
    return net.eval()


def _images() -> list[Tensor]:
    coarse = torch.randn(128, 3, 3, 3, generator=torch.Generator().manual_seed(7))
    return list(torch.split(nn.functional.interpolate(coarse, size=8, mode="bilinear"), 32))


def _refitted(net: _Net, level: float, repair: Repair, folder: Path) -> tuple[_Net, dict[str, float]]:
    pruned = copy.deepcopy(net)
    dense, graph = (capture(each, torch.zeros(2, 3, 8, 8), share=True).eval() for each in (net, pruned))
    layers = prunable_layers(graph, pruned)
    masks = choose_masks({each.parameter: each.weight.detach().flatten(1).abs() for each in layers}, level, "layer")
    masks = {each.parameter: each.as_weight(masks[each.parameter]) for each in layers}
    with torch.no_grad():
        for each in layers:
            each.weight.mul_(masks[each.parameter])
    errors = refit(dense, graph, {each.node.name: each for each in layers}, masks, _images(), folder, repair)
    assert all(bool((each.weight[~masks[each.parameter]] == 0).all()) for each in layers)
    return pruned, errors


def test_refit_leaves_a_model_that_is_not_pruned_as_it_is(tmp_path: Path) -> None:
    net = _net()
    same, errors = _refitted(net, 0.0, Repair(), tmp_path)
    assert max(errors.values()) < 1e-9
    for name, value in same.state_dict().items():
        assert torch.allclose(value, net.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_each_repair_brings_the_outputs_nearer(tmp_path: Path) -> None:
    net, images = _net(), _images()[0]
    repairs = (Repair(weights=False, norms=False), Repair(weights=False), Repair())
    models = [_refitted(net, 0.5, repair, tmp_path)[0] for repair in repairs]
    with torch.inference_mode():
        errors = [float((model(images) - net(images)).square().mean()) for model in models]
    assert errors[0] > 2 * errors[2]
    assert errors[1] > errors[2]


def test_importance_is_the_mean_square_of_what_outputs_do_to_the_logits() -> None:
    torch.manual_seed(9)
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    graph = capture(net, torch.zeros(2, 3), share=True).eval()
    layers = prunable_layers(graph, net)
    found = output_importance(graph, layers, torch.randn(4, 2000, 3), seed=0)
    expected = [net[1].weight.square().sum(0), torch.ones(4)]
    for layer, wanted in zip(layers, expected, strict=True):
        assert torch.allclose(found[layer.node.name].float(), wanted, rtol=0.1), layer.parameter


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        pytest.param([], ["conv.weight", "by_group.weight", "fc.weight"], id="all"),
        pytest.param(["conv|fc"], ["conv.weight", "fc.weight"], id="layers"),
        pytest.param(["fc.weight"], ["fc.weight"], id="a parameter"),
    ],
)
def test_layers_are_chosen_by_name(patterns: list[str], wanted: list[str]) -> None:
    net = _net()
    layers = prunable_layers(capture(net, torch.zeros(2, 3, 8, 8), share=True), net)
    assert [each.parameter for each in chosen_layers(layers, patterns, "--prune-layers")] == wanted


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("cnv", "--prune-layers 'cnv' matches no layer whose weights .* did you mean conv", id="unknown"),
        pytest.param("*", "--prune-layers '\\*' is not a regular expression", id="no expression"),
    ],
)
def test_names_that_match_nothing(pattern: str, message: str) -> None:
    net = _net()
    layers = prunable_layers(capture(net, torch.zeros(2, 3, 8, 8), share=True), net)
    with pytest.raises(UsageError, match=message):
        chosen_layers(layers, [pattern], "--prune-layers")


def test_unit_scores_are_infinite_where_a_pattern_forbids_to_remove() -> None:
    losses = removal_losses(torch.tensor([[1.0, 2.0, 4.0, 3.0]]), torch.eye(4), torch.tensor([0, 0, 1, 1]), 1)
    assert losses.tolist() == [[1.0, math.inf, math.inf, 9.0]]
