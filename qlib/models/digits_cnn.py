"""A small network for scikit-learn's digits (8x8 pixels), which has a layer of each kind that quantization treats.

Its weights come with the package; `tools/train_digits_cnn.py` made them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlib.checkpoint.fit import model_state
from qlib.checkpoint.read import read_checkpoint
from qlib.models.add import Add
from qlib.models.cifar import small_image_spec
from qlib.models.spec import ModelSpec, StateDict

WEIGHTS = Path(__file__).parent / "weights" / "digits_cnn.safetensors"


class DigitsCnn(nn.Module):
    """A depthwise-separable residual block, two parallel branches that are concatenated, and a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(1, 16, kernel=3)
        self.depthwise = _conv_bn_relu6(16, 16, kernel=3, groups=16)
        self.pointwise = nn.Sequential(OrderedDict(conv=nn.Conv2d(16, 16, 1, bias=False), bn=nn.BatchNorm2d(16)))
        self.residual_eltwiseadd = Add()
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.wide = _conv_bn_relu6(16, 24, kernel=3)
        self.narrow = _conv_bn_relu6(16, 8, kernel=1)
        self.avgpool = nn.AvgPool2d(2)
        self.fc = nn.Linear(32 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, num_classes)."""
        x = self.stem(x)
        x = self.relu(self.residual_eltwiseadd(self.pointwise(self.depthwise(x)), x))
        x = self.maxpool(x)
        x = torch.cat([self.wide(x), self.narrow(x)], dim=1)
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def _conv_bn_relu6(in_channels: int, channels: int, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU6()))


def _weights() -> StateDict:
    return model_state(read_checkpoint(WEIGHTS))


def model_spec(arch: str) -> ModelSpec:
    """The spec of `digits_cnn`."""
    return replace(small_image_spec(arch, "digits", DigitsCnn), weights=_weights)
