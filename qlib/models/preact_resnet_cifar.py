"""Pre-activation ResNet for CIFAR-10.

Where the shape changes, the shortcut is an average pool with zero channels added, or (`_conv_ds`) a 1x1 convolution of
the activated input.

References:
    He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.add import Add
from qlib.models.cifar import conv3x3, small_image_spec
from qlib.models.spec import ModelSpec


class PreactBlock(nn.Module):
    """Batch-norm and ReLU before each of two convolutions, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, conv_downsample: bool) -> None:
        super().__init__()
        self.pre_bn = nn.BatchNorm2d(in_channels)
        self.pre_relu = nn.ReLU()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        self.residual_eltwiseadd = Add()
        self.conv_downsample = conv_downsample
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = _shortcut(in_channels, channels, stride, conv_downsample)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        active: Tensor = self.pre_relu(self.pre_bn(x))
        residual = x
        if self.downsample is not None:
            residual = self.downsample(active if self.conv_downsample else x)
        inner = self.conv2(self.relu(self.bn(self.conv1(active))))
        out: Tensor = self.residual_eltwiseadd(inner, residual)
        return out


def _shortcut(in_channels: int, channels: int, stride: int, conv: bool) -> nn.Module:
    if conv:
        return nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
    extra = (channels - in_channels) // 2
    return nn.Sequential(nn.AvgPool2d(stride), nn.ConstantPad3d((0, 0, 0, 0, extra, extra), 0.0))


class PreactResNetCifar(nn.Module):
    """`blocks` blocks in each of three stages: 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, conv_downsample: bool, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.layer1 = _stage(16, 16, blocks, 1, conv_downsample)
        self.layer2 = _stage(16, 32, blocks, 2, conv_downsample)
        self.layer3 = _stage(32, 64, blocks, 2, conv_downsample)
        self.final_bn = nn.BatchNorm2d(64)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.final_relu(self.final_bn(x)))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int, conv_downsample: bool) -> nn.Sequential:
    first = PreactBlock(in_channels, channels, stride, conv_downsample)
    return nn.Sequential(first, *(PreactBlock(channels, channels, 1, False) for _ in range(blocks - 1)))


def model_spec(arch: str) -> ModelSpec:
    """The spec of `preact_resnet<depth>_cifar[_conv_ds]`."""
    (depth,) = re.findall(r"\d+", arch)
    build = partial(PreactResNetCifar, (int(depth) - 2) // 6, arch.endswith("_conv_ds"))
    return small_image_spec(arch, "cifar10", build)
