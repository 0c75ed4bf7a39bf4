"""Recipes of thinned models in checkpoints: Distiller's are understood, and what is damaged is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlib.checkpoint.unpickle import Inert
from qlib.errors import CheckpointError
from qlib.surgery.recipe_file import recipe_in, saved_recipe, thinned_as
from qlib.surgery.thin import recipe_of

EXAMPLE = torch.zeros(2, 3, 2, 2)
KEPT = torch.tensor([0, 2])


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10)).eval()


def distillers(parameters: dict[str, Any], modules: dict[str, Any] | None = None) -> Inert:
    return Inert("distiller.thinning.ThinningRecipe", ({} if modules is None else modules, parameters))


NORM = {"module.1": {"num_features": 2, "running_mean": (0, KEPT), "running_var": (0, KEPT)}}
CUT = {
    "module.0.weight": [(0, KEPT)],
    "module.0.bias": [(0, KEPT)],
    "module.1.weight": [(0, KEPT)],
    "module.1.bias": [(0, KEPT)],
    "module.3.weight": [(1, KEPT, (10, 4, 2, 2), (10, 8))],
}


def test_a_recipe_of_distiller_thins_as_it_did() -> None:
    whole = {"thinning_recipes": [distillers(CUT, NORM)]}
    model = thinned_as(net(), whole, EXAMPLE, "it")
    kept = {(each.name, each.axis): each.kept for each in recipe_of(model).entries}
    assert kept["3.weight", 1] == (0, 1, 2, 3, 8, 9, 10, 11)
    assert kept["1.running_var", 0] == kept["0.weight", 0] == (0, 2)
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 10)
    ours = thinned_as(net(), saved_recipe(model), EXAMPLE, "it")
    assert recipe_of(ours) == recipe_of(model)


def test_recipes_of_distiller_add_up() -> None:
    """The second counts in what the first has left; one that finds what it would leave is a repetition."""
    first = distillers({"0.weight": [(0, torch.tensor([0, 2, 3]))]})
    second = distillers({"0.weight": [(0, torch.tensor([1, 2]))]})
    recipe = recipe_in({"thinning_recipes": [first, second, second]}, "it")
    assert recipe is not None
    assert [each.kept for each in recipe.entries] == [(2, 3)]
    assert recipe_in({"state_dict": {}, "thinning_recipes": None}, "it") is None


ENTRY = {"parameter": "0.weight", "axis": 0, "size": 4, "kept": [0, 2]}


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        pytest.param({"thinning": 3}, "it has the thinning 3; allowed: a list; give the checkpoint that", id="no list"),
        pytest.param({"thinning": [{**ENTRY, "axis": -1}]}, "it has the thinning.0.axis -1; allowed: ", id="axis"),
        pytest.param({"thinning": [{**ENTRY, "kept": []}]}, "keeps no rising indices of '0.weight'", id="nothing"),
        pytest.param({"thinning": [{**ENTRY, "kept": [0, 9]}]}, "keeps no rising indices of '0.weight'", id="outside"),
        pytest.param({"thinning": [{**ENTRY, "parameter": "9.weight"}]}, "'9.weight' is no tensor of", id="unknown"),
        pytest.param({"thinning": [{**ENTRY, "axis": 5}]}, "has 0 indices on axis 5, of 4; give the -a", id="no axis"),
        pytest.param({"thinning": [{**ENTRY, "axis": 1, "size": 3}]}, "axis 1 of '0.weight' is one that", id="images"),
        pytest.param({"thinning_recipes": ["cut"]}, "a thinning recipe that is none of Distiller's", id="text"),
        pytest.param({"thinning_recipes": 4}, "a thinning recipe that is none of Distiller's", id="a number"),
        pytest.param(
            {"thinning_recipes": [distillers({"0.weight": [(0, [0, 1])]})]}, "say what is kept of '0.weight'", id="list"
        ),
        pytest.param(
            {"thinning_recipes": [distillers({"0.weight": [(0, torch.tensor([-1]))]})]}, "no indices of", id="negative"
        ),
        pytest.param(
            {"thinning_recipes": [distillers({"3.weight": [(1, KEPT, (10, 4, 10**7, 10**7), (10, 8))]})]},
            "keeps too many indices of '3.weight'",
            id="huge",
        ),
        pytest.param(
            {"thinning_recipes": [distillers({"0.weight": [(0, KEPT)]}), distillers({"0.weight": [(0, KEPT[1:])]})]},
            "keeps what an earlier one has removed",
            id="twice",
        ),
    ],
)
def test_damaged_recipes_are_refused(checkpoint: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as error:
        thinned_as(net(), checkpoint, EXAMPLE, "it")
    assert sentence in str(error.value)
