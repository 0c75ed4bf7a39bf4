"""Masks of a model: what applying them does, and the sentences about those that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlib.errors import CheckpointError
from qlib.prune.masks import apply_masks, check_masks, joined, masked_count, masks_of_zeros, sparsity, unmasked


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_what_is_masked_is_zero_and_the_rest_is_as_it_was() -> None:
    model, before = net(), net().state_dict()
    masks = {"0.weight": torch.rand(3, 2, 3, 3) < 0.5, "3.weight": torch.rand(4, 12) < 0.1}
    assert set(unmasked(model, masks)) == set(masks)
    apply_masks(model, masks)
    assert unmasked(model, masks) == {}
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, before[name], torch.zeros_like(value)))
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of_zeros(model).items())
    assert masked_count(masks_of_zeros(model)) == masked_count(masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param(
            {"0.weigth": torch.ones(3, 2, 3, 3).bool()},
            "'a' has a mask of '0.weigth', which the model does not have; did you mean 0.weight",
            id="name",
        ),
        pytest.param(
            {"3.weight": torch.ones(12, 4).bool()},
            "'a' has a mask of 12x4 for '3.weight', whose shape is 4x12; give the model that was pruned",
            id="shape",
        ),
        pytest.param({"1.running_mean": torch.ones(3).bool()}, "'1.running_mean', which the model does", id="buffer"),
    ],
)
def test_masks_that_do_not_fit(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^(?:.*){message}"):
        check_masks(net(), masks, "'a'")


def test_masks_that_fit() -> None:
    check_masks(net(), {"3.bias": torch.tensor([True, False, True, True])}, "'a'")


def test_joined_masks_keep_what_both_keep() -> None:
    one, two = {"a": torch.rand(50) < 0.5, "b": torch.ones(2).bool()}, {"a": torch.rand(50) < 0.5}
    both = joined(one, two)
    assert torch.equal(both["a"], one["a"] & two["a"])
    assert torch.equal(both["b"], one["b"])
    assert sparsity(both["a"]) >= max(sparsity(one["a"]), sparsity(two["a"]))
