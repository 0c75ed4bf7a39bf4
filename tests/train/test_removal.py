"""Removers in the course of training: the model becomes smaller, and what stays goes on as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import good, run
from saved import contents, same

from qlib.models import create_model, find_model

PRUNE_AND_REMOVE = """\
version: 1
pruners:
  filters:
    class: L1RankedStructureParameterPruner
    group_type: Filters
    desired_sparsity: 0.5
    weights: [module.wide.conv.weight]
  fine: {class: SparsityLevelParameterPruner, levels: {module.fc.weight: 0.5}}
lr_schedulers:
  decay: {class: StepLR, step_size: 1, gamma: 0.5}
extensions:
  net_thinner: {class: FilterRemover, thinning_func_str: remove_filters, arch: resnet20_cifar, dataset: cifar10}
policies:
  - {pruner: {instance_name: filters}, epochs: [1]}
  - {pruner: {instance_name: fine}, epochs: [0]}
  - {extension: {instance_name: net_thinner}, epochs: [1]}
  - {lr_scheduler: {instance_name: decay}, starting_epoch: 0, ending_epoch: 3, frequency: 1}
"""
FAST = "-a digits_cnn --pretrained --compress a.yaml --epochs 3 --lr 0.01 -b 64 --etrs 0.2 --evs 0.1 --etes 0.1"


def test_filters_leave_in_the_course_of_training(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PRUNE_AND_REMOVE)
    done = good(FAST, tmp_path)
    assert "FilterRemover in epoch 1: 0 channels are read by no weight, and 12 are the same number" in done.out
    checkpoint = contents(done.folder / "checkpoint.pth.tar")
    state = checkpoint["state_dict"]
    assert state["wide.conv.weight"].shape == (12, 16, 3, 3)
    assert state["wide.bn.running_mean"].shape == (12,)
    assert state["fc.weight"].shape == (10, 80)  # 4 columns a channel
    assert torch.equal(state["fc.weight"] != 0, checkpoint["masks"]["fc.weight"] != 0)
    momentum = [each["momentum_buffer"] for each in checkpoint["optimizer_state_dict"]["state"].values()]
    assert (12, 16, 3, 3) in [tuple(each.shape) for each in momentum]
    assert checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(0.01 / 8)
    again = good(f"--resume-from {done.folder}/checkpoint.pth.tar -e --etes 0.1", tmp_path)
    assert [line for line in done.lines if line.startswith("==> Top1")][-1] in again.lines


def test_a_run_that_is_resumed_after_a_removal_ends_in_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PRUNE_AND_REMOVE)
    expected = contents(good(FAST, tmp_path).folder / "checkpoint.pth.tar")
    for epochs in (1, 2):
        shutil.rmtree(tmp_path / "logs")
        part = good(FAST.replace("--epochs 3", f"--epochs {epochs}"), tmp_path)
        rest = good(FAST + f" --resume-from {part.folder}/checkpoint.pth.tar", tmp_path)
        assert same(contents(rest.folder / "checkpoint.pth.tar"), expected)


def test_nothing_to_remove_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PRUNE_AND_REMOVE.replace("desired_sparsity: 0.5", "desired_sparsity: 0.01"))
    done = good(FAST.replace("--epochs 3", "--epochs 2"), tmp_path)
    line = (
        "FilterRemover in epoch 1: no channel is zero where it is made, or where it is read; the model stays as it is"
    )
    assert line in done.lines


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        pytest.param(
            "  - {quantizer: {instance_name: q}, starting_epoch: 1, ending_epoch: 3, frequency: 1}\n"
            "quantizers: {q: {class: QuantAwareTrainRangeLinearQuantizer, bits_weights: 8}}\n",
            "",
            "FilterRemover acts in epoch 1, when a quantizer has begun (epoch 1); remove before that",
            id="under a quantizer",
        ),
        pytest.param(
            "",
            "--kd-teacher self",
            "FilterRemover makes another model of the one that is its own teacher; name the teacher, and give its",
            id="its own teacher",
        ),
    ],
)
def test_what_cannot_be_removed_from(more: str, flags: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(PRUNE_AND_REMOVE + more)
    done = run(f"{FAST} {flags}", tmp_path)
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_model_without_masks_is_thinned_by_its_zeros(tmp_path: Path) -> None:
    """As a group lasso leaves them, which has made no masks."""
    state = dict(create_model(find_model("digits_cnn"), pretrained=True).state_dict())
    state["wide.conv.weight"][:4] = 0
    torch.save({"arch": "digits_cnn", "state_dict": state}, tmp_path / "zeros.pth")
    (tmp_path / "a.yaml").write_text(
        "extensions: {r: {class: ChannelRemover, thinning_func_str: remove_channels}}\n"
        "policies: [{extension: {instance_name: r}, epochs: [0]}]\n"
    )
    words = FAST.replace("--pretrained", "--exp-load-weights-from zeros.pth").replace("--epochs 3", "--epochs 1")
    done = good(words, tmp_path)
    assert contents(done.folder / "checkpoint.pth.tar")["state_dict"]["wide.conv.weight"].shape == (20, 16, 3, 3)


def test_masks_of_a_model_that_is_thinned_twice(tmp_path: Path) -> None:
    state = dict(create_model(find_model("digits_cnn"), pretrained=True).state_dict())
    masks = {name: torch.ones_like(state[name], dtype=torch.uint8) for name in ("wide.conv.weight", "fc.weight")}
    masks["wide.conv.weight"][:4], masks["fc.weight"][:, 100:103] = 0, 0
    torch.save({"arch": "digits_cnn", "state_dict": state, "masks": masks}, tmp_path / "a.pth")
    first = good("--resume-from a.pth --thinnify -e --etes 0.1", tmp_path).folder / "thinned_checkpoint.pth.tar"
    once = contents(first)
    assert {name: tuple(mask.shape[:2]) for name, mask in once["masks"].items()} == {
        "wide.conv.weight": (20, 16),
        "fc.weight": (10, 112),
    }
    once["masks"]["wide.conv.weight"][:5] = 0
    torch.save(once, tmp_path / "b.pth")
    twice = contents(good("--resume-from b.pth --thinnify -e --etes 0.1", tmp_path).folder / first.name)["masks"]
    assert {name: tuple(mask.shape[:2]) for name, mask in twice.items()} == {
        "wide.conv.weight": (15, 16),
        "fc.weight": (10, 92),
    }
    assert int((twice["fc.weight"] == 0).sum()) == int((once["masks"]["fc.weight"] == 0).sum()) == 30
