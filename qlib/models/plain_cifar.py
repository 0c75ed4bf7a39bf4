"""The 20-layer network without shortcuts for CIFAR-10, with and without batch-norm.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.cifar import conv3x3, small_image_spec
from qlib.models.spec import ModelSpec


class PlainBlock(nn.Module):
    """Two convolutions, each with ReLU and perhaps batch-norm."""

    def __init__(self, in_channels: int, channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels) if batch_norm else None
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels) if batch_norm else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        x = self.conv1(x)
        x = self.relu1(x if self.bn1 is None else self.bn1(x))
        x = self.conv2(x)
        out: Tensor = self.relu2(x if self.bn2 is None else self.bn2(x))
        return out


class PlainCifar(nn.Module):
    """Three stages of three blocks."""

    def __init__(self, batch_norm: bool, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16) if batch_norm else None
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, batch_norm)
        self.layer2 = _stage(16, 32, 2, batch_norm)
        self.layer3 = _stage(32, 64, 2, batch_norm)
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, num_classes)."""
        x = self.conv1(x)
        x = self.relu(x if self.bn1 is None else self.bn1(x))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out


def _stage(in_channels: int, channels: int, stride: int, batch_norm: bool) -> nn.Sequential:
    first = PlainBlock(in_channels, channels, stride, batch_norm)
    return nn.Sequential(first, *(PlainBlock(channels, channels, 1, batch_norm) for _ in range(2)))


def model_spec(arch: str) -> ModelSpec:
    """The spec of `plain20_cifar` or `plain20_cifar_nobn`."""
    return small_image_spec(arch, "cifar10", partial(PlainCifar, not arch.endswith("_nobn")))
