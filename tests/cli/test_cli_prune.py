"""Pruning without training from the command line: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import Run, good
from runs import run as run_in

from qlib.prune.masks import sparsity
from qlib.report.record_file import read_report

MODEL = "-a digits_cnn --pretrained"
FEW = "--prune-images 64"


def fc_kept(run: Run) -> int:
    """How many weights of the last layer are not zero in the checkpoint."""
    checkpoint = torch.load(run.folder / "pruned_checkpoint.pth.tar", weights_only=True)
    return int(checkpoint["masks"]["fc.weight"].sum())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that removes 70 % of the weights, in a folder of its own."""
    return good(f"{MODEL} --prune obs --prune-level 0.7 {FEW}", tmp_path_factory.mktemp("pruned"))


def test_a_run_prints_what_it_removed_and_what_that_is_good_for(pruned: Run) -> None:
    assert "| fc.weight             | 10x128    |" in pruned.out
    assert "|      69.99 |         |" in pruned.out
    assert "Agreement with FP32: " in pruned.out
    assert "Weights, zipped: 0.01 MB, 0.02 MB before; Zeros among the weights, of N:M too, make" in pruned.out
    assert float(pruned.metrics("pruned")["top1"]) > 97
    assert pruned.files >= {"pruned_checkpoint.pth.tar", "metrics.csv", "predictions.csv"}
    rows = read_report(pruned.folder).pruned
    assert [(each.kept, each.total) for each in rows if each.name == "fc.weight"] == [(fc_kept(pruned), 1280)]
    assert "What pruning kept" in (pruned.folder / "report.html").read_text()


def test_the_checkpoint_is_evaluated_and_quantized_with_its_zeros(pruned: Run, tmp_path: Path) -> None:
    file = pruned.folder / "pruned_checkpoint.pth.tar"
    checkpoint = torch.load(file, weights_only=True)
    for name, mask in checkpoint["masks"].items():
        assert not bool(checkpoint["state_dict"][name][mask == 0].any()), name
    again = good(f"-e --resume-from {file}", tmp_path)
    assert again.score("fp32") == pruned.score("pruned")
    assert "are applied: they zero 3,785 weights in 6 parameters" in again.out
    quantized = good(f"--qe --resume-from {file} --qebw 8 --qe-calibration 0.1", tmp_path)
    assert float(quantized.metrics("quantized")["top1"]) > 97


def test_pruning_and_quantizing_in_one_run_repeats_from_its_yaml(tmp_path: Path) -> None:
    done = good(f"{MODEL} --prune lamp --prune-level 0.5 {FEW} --qe --qe-calibration 0.1", tmp_path)
    assert float(done.metrics("quantized")["top1"]) > 97
    again = good(f"--run-config {done.folder}/configs/run_config.yaml", tmp_path)
    assert again.score("pruned") == done.score("pruned")
    assert again.score() == done.score()


def test_channels_are_removed_under_a_budget_and_the_smaller_model_goes_on(tmp_path: Path) -> None:
    words = "--prune channels-obs --prune-budget params=0.5 --prune-round-to 4 --prune-images 64"
    done = good(f"{MODEL} {words}", tmp_path)
    assert "| wide.conv.weight   |" in done.out
    assert "Parameters         5,578 -> " in done.out
    assert float(done.metrics("pruned")["top1"]) > 90
    assert all(each.kept % 4 == 0 and each.kept <= each.total for each in read_report(done.folder).pruned)
    checkpoint = torch.load(done.folder / "thinned_checkpoint.pth.tar", weights_only=True)
    state = checkpoint["state_dict"]
    assert sum(value.numel() for name, value in state.items() if name.endswith("weight")) <= 5578 // 2
    assert {state[f"{name}.conv.weight"].shape[0] % 4 for name in ("stem", "wide", "narrow")} == {0}
    again = good(f"--qe --qe-calibration 0.1 --resume-from {done.folder}/thinned_checkpoint.pth.tar", tmp_path)
    assert again.score("fp32")[0] == done.score("pruned")[0]


def test_a_pattern_and_the_layers_that_it_does_not_fit(tmp_path: Path) -> None:
    done = good(f"{MODEL} --prune magnitude --prune-pattern 2:4 --prune-repair logits --prune-steps 3 {FEW}", tmp_path)
    assert "stem.conv.weight stays dense: its 1 input channels are no multiple of 4" in done.out
    masks = torch.load(done.folder / "pruned_checkpoint.pth.tar", weights_only=True)["masks"]
    assert sorted(masks) == ["fc.weight", "narrow.conv.weight", "pointwise.conv.weight", "wide.conv.weight"]
    assert {sparsity(mask) for mask in masks.values()} == {0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param("--prune lamp", "--prune lamp needs --prune-level, the share of the weights to", id="no level"),
        pytest.param(
            "--prune lamp --prune-level 1.0", "'1.0' is not allowed: it must be a share above 0", id="level 1"
        ),
        pytest.param("--prune lamp --prune-pattern 4:4", "it must be N:M, N of each M weights", id="pattern"),
        pytest.param("--prune lamb --prune-level 0.5", "did you mean lamp", id="method"),
        pytest.param("--prune lamp --prune-level 0.5 --prune-pattern 2:4", "cannot be combined", id="both"),
        pytest.param("--prune channels-obs --prune-level 0.5", "removes channels: give --prune-budget", id="no budget"),
        pytest.param("--prune lamp --prune-budget macs=0.5", "--prune-budget is of channels, which", id="no channels"),
        pytest.param("--prune group-norm --prune-budget macs=1.5", "it must be macs=0.5 or params=0.5", id="above 1"),
        pytest.param(
            "--prune group-norm --prune-budget macs=0.001",
            "--prune-budget macs=0.001 cannot be met: with the fewest channels that may stay it is macs=0.0",
            id="budget",
        ),
        pytest.param("--prune lamp --prune-level 0.5 --epochs 1", "--prune comes before training", id="training"),
        pytest.param(
            "--prune lamp --prune-pattern 2:4 --prune-layers stem.*",
            "--prune-pattern 2:4 needs a layer whose input channels are a multiple of 4, and none of the 1 chosen is",
            id="2:4 on one channel",
        ),
        pytest.param("--prune lamp --prune-level 0.5 --prune-layers no", "'no' matches no layer", id="no such layer"),
        pytest.param(
            "--prune magnitude --prune-scope global --prune-level 0.9999",
            "nothing would be left of 'stem.conv.weight'; lower --prune-level",
            id="an empty layer",
        ),
    ],
)
def test_what_is_refused(flags: str, message: str, tmp_path: Path) -> None:
    done = run_in(f"{MODEL} {flags}", tmp_path)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        pytest.param("-e --prune-level 0.5", "--prune-level has no effect without --prune", id="level alone"),
        pytest.param(
            "--summary compute --prune lamp --prune-level 0.5",
            "--prune is ignored: --summary only prints",
            id="summary",
        ),
    ],
)
def test_what_has_no_effect_is_told(flags: str, warning: str, tmp_path: Path) -> None:
    assert f"Warning: {warning}" in good(f"{MODEL} {flags}", tmp_path).out
