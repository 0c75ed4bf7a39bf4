"""Models that users bring: dead channels, their own spelling of layers, logits in a dictionary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import good, make_images, run
from torch import Tensor, nn

from qlib.graph import FoldedGraph, fold

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
RESNET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)

def net(num_classes=4):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)]
    model = nn.Sequential()
    for name, module in zip("conv1 layer1 layer2 pool flat fc".split(), [nn.Conv2d(3, 4, 1), *(
        nn.Sequential(Block()) for _ in range(2)), *head]):
        model.add_module(name, module)
    model.dataset, model.input_shape = "imagefolder", (3, 8, 8)
    return model
"""
QUANTIZE = "--qe --qe-calibration 1.0 --qe-mode asym_u --qe-per-channel"


SETTINGS = """\
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 8
    bits_parameters: 8
    per_channel_wts: true
    model_activation_stats: {stats}
"""


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
    comment, line = (line for line in plan.read_text().splitlines() if "raised" in line)
    assert comment == "    # raised: so many scales are larger than their weights ask for, so that int32 holds the sums"
    assert line.startswith("    weight: {bits: 8, mode: asym_u, per_channel: true, raised: 2, min: [")
    shown = good(f"-a dead.py:dead images --check --qe-config-file {plan}", folder).lines
    assert "8 asym_u per channel, 2 raised for int32" in next(row for row in shown if row.startswith("| conv "))
    Path(folder / "ptq.yaml").write_text(SETTINGS.format(stats=done.folder / "acts_quantization_stats.yaml"))
    assert told in good("-a dead.py:dead images --check --qe-config-file ptq.yaml", folder).lines
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


def test_statistics_plans_and_settings_may_name_layers_as_distiller_does(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "r.py").write_text(RESNET)
    bits = "overrides:\n      {}: {{bits_activations: 4}}\n      {}: {{bits_activations: 3}}"
    ptq = "quantizers:\n  q:\n    class: PostTrainLinearQuantizer\n    model_activation_stats: {}.yaml\n    " + bits
    stats = Path(good("-a r.py:net images --qe-calibration 1", tmp_path).folder / "acts_quantization_stats.yaml")

    def distillers(text: str) -> str:
        for number in (2, 1):
            text = re.sub(rf"(layer\d\.0\.relu){'_1' * (number == 2)}:", rf"\g<1>{number}:", text)
        return text

    ours = stats.read_text()
    (tmp_path / "ours.yaml").write_text(ours)
    theirs = distillers(ours)
    (tmp_path / "theirs.yaml").write_text(theirs[theirs.index("\nconv1:") + 1 :])  # without a header of ours
    assert "layer2.0.relu2:" in theirs
    (tmp_path / "a.yaml").write_text(ptq.format("ours", "layer1.0.relu", ".*relu_1"))
    (tmp_path / "b.yaml").write_text(ptq.format("theirs", "layer1.0.relu1", ".*relu2"))
    mine = good("-a r.py:net images --qe --qe-config-file a.yaml", tmp_path)
    other = good("-a r.py:net images --qe --qe-config-file b.yaml", tmp_path)
    plan = (mine.folder / "layer_quant_params.yaml").read_text()
    assert (other.folder / "layer_quant_params.yaml").read_text() == plan
    assert "layer2.0.relu_1:" in plan
    assert "bits: 3," in plan
    (tmp_path / "plan.yaml").write_text(distillers(plan))
    again = good("-a r.py:net images --qe --qe-config-file plan.yaml", tmp_path)
    assert (again.folder / "layer_quant_params.yaml").read_text() == plan
    assert again.score() == mine.score() == other.score()


def test_a_graph_that_computes_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, example: Tensor) -> FoldedGraph:
        folded = fold(model, example)
        next(folded.graph.parameters()).data.mul_(1.5)
        return folded

    words = "-a digits_cnn --pretrained --quantize-eval --qe-calibration 0.01"
    assert "captured graph" not in good(words, tmp_path).out
    monkeypatch.setattr("qlib.app.capture.fold", wrong)
    told = [
        line for line in good(words, tmp_path).lines if line.startswith("Warning: the captured graph of digits_cnn")
    ]
    assert len(told) == 1
    assert told[0].endswith("what follows is of the graph: please report the model")
