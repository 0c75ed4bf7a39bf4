"""ResNet for CIFAR-10: three stages of 16, 32 and 64 channels.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.add import Add
from qlib.models.cifar import conv3x3, small_image_spec
from qlib.models.spec import ModelSpec


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.residual_eltwiseadd = Add()
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        residual = x if self.downsample is None else self.downsample(x)
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        out: Tensor = self.relu2(self.residual_eltwiseadd(inner, residual))
        return out


class ResNetCifar(nn.Module):
    """`blocks` basic blocks in each of three stages: 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def model_spec(arch: str) -> ModelSpec:
    """The spec of `resnet<depth>_cifar`."""
    (depth,) = re.findall(r"\d+", arch)
    return small_image_spec(arch, "cifar10", partial(ResNetCifar, (int(depth) - 2) // 6))
