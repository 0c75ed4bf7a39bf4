"""Models that users bring: dead channels, their own spelling of layers, logits in a dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import good, make_images, run

DEAD = '''
import torch
import torch.nn.functional as F
from torch import nn

class Conv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)

class Net(nn.Module):
    """Two of its channels are dead: their weights are next to nothing beside their biases."""

    dataset, input_shape = "imagefolder", (3, 8, 8)

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = Conv(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)
        self.conv.weight.data[:2] *= 1e-12
        self.norm.bias.data.uniform_(-1, 1)
        self.norm.weight.data[:2] = 1e-3

    def forward(self, x):
        features = F.relu(self.norm(self.conv(x)))
        return {"features": features, "logits": self.fc(features.mean((2, 3)))}

def dead(num_classes=4):
    return Net(num_classes)

class Two(Net):
    def forward(self, x, y):
        return super().forward(x + y)

def two(num_classes=4):
    return Two(num_classes)

class Unclear(Net):
    def forward(self, x):
        logits = super().forward(x)["logits"]
        return logits, 2 * logits

def unclear(num_classes=4):
    return Unclear(num_classes)
'''
QUANTIZE = "--qe --qe-calibration 1.0 --qe-mode asym_u --qe-per-channel"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_images(tmp_path / "images")
    (tmp_path / "dead.py").write_text(DEAD)
    return tmp_path


def test_dead_channels_are_told_and_verified(folder: Path) -> None:
    done = good(f"-a dead.py:dead images {QUANTIZE} --export-onnx --verify 12", folder)
    told = next(line for line in done.lines if line.startswith("Scales of weights raised"))
    assert told == "Scales of weights raised so that int32 holds their biases, channels by layer: conv (2)"
    assert "100.0 % of the multiply-accumulates are computed in integers: 4 of 4 layers" in done.lines
    assert "verification: exact" in done.lines
    assert not any("weights are random" in line for line in done.lines)
    plan = done.folder / "layer_quant_params.yaml"
    again = good(f"-a dead.py:dead images --qe --qe-config-file {plan}", folder)
    assert again.score() == done.score()
    assert (again.folder / "layer_quant_params.yaml").read_bytes() == plan.read_bytes()
    assert not any(line.startswith("Scales of weights raised") for line in again.lines)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("two", "takes 2 inputs (x, y); images are one: wrap the model in a module"),
        (
            "unclear",
            "more than one tensor that could be its logits (number 0, number 1); make it return its logits alone",
        ),
    ],
)
def test_what_a_model_may_not_be(folder: Path, function: str, sentence: str) -> None:
    done = run(f"-a dead.py:{function} images {QUANTIZE}", folder)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
