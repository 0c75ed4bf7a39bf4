"""Models without channels, from the command line: `--thinnify`, and what becomes of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import good

from qlib.checkpoint.read import read_checkpoint
from qlib.models import create_model, find_model

THINNED = "thinned_checkpoint.pth.tar"
SHAPES = {"wide.conv.weight": (22, 16, 3, 3), "fc.weight": (10, 120), "stem.conv.weight": (16, 1, 3, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of digits_cnn: nothing reads channel 3 of `wide`, and channel 5 is made of zeros."""
    folder = tmp_path_factory.mktemp("thinning")
    state = create_model(find_model("digits_cnn"), pretrained=True).state_dict()
    state["fc.weight"][:, 12:16] = 0
    state["wide.conv.weight"][5] = 0
    state["wide.bn.bias"][5] = 0.7
    torch.save({"arch": "digits_cnn", "state_dict": state}, folder / "dense.pth.tar")
    return folder


@pytest.fixture(scope="module")
def thinned(folder: Path) -> Path:
    """The file that `--thinnify` leaves."""
    run = good("--resume-from dense.pth.tar --thinnify", folder)
    assert "--thinnify: 1 channels are read by no weight, and 1 are the same number for all images" in run.lines
    assert "Weights            5,408 ->         5,040 (93.2 %)" in run.lines
    return run.folder / THINNED


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    state = read_checkpoint(path)["state_dict"]
    return {name: tuple(state[name].shape) for name in SHAPES}


def test_zero_channels_go_and_nothing_changes(folder: Path, thinned: Path) -> None:
    dense = good("--resume-from dense.pth.tar -e", folder)
    both = good("--resume-from dense.pth.tar --thinnify -e", folder)
    again = good(f"--resume-from {thinned} -e", folder)
    assert shapes(thinned) == SHAPES
    for run in (both, again):
        assert run.score("fp32")[:2] == dense.score("fp32")[:2]
        assert float(run.score("fp32")[2]) == pytest.approx(float(dense.score("fp32")[2]), rel=1e-5)


def test_a_model_without_zeros_stays(folder: Path) -> None:
    run = good("-a digits_cnn --pretrained --thinnify", folder)
    assert any("no channel is zero where it is made" in line for line in run.lines)
    assert THINNED not in run.files


def test_a_thinned_checkpoint_quantizes_verifies_and_loads_again(folder: Path, thinned: Path) -> None:
    run = good(f"--resume-from {thinned} --qe --qe-calibration 0.2 --verify 4 --export-onnx m.onnx", folder)
    again = good(f"--resume-from {run.folder / 'quantized_checkpoint.pth.tar'} -e", folder)
    assert again.score() == run.score()


def test_a_thinned_checkpoint_trains_and_stays_thin(folder: Path, thinned: Path) -> None:
    run = good(f"--exp-load-weights-from {thinned} --epochs 1 --lr 0.001 --etrs 0.1", folder)
    assert shapes(run.folder / "best.pth.tar") == SHAPES
    more = good(f"--resume-from {run.folder / 'checkpoint.pth.tar'} --epochs 2 --lr 0.001 --etrs 0.1", folder)
    assert shapes(more.folder / "checkpoint.pth.tar") == SHAPES
