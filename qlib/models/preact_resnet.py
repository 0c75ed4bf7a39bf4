"""Pre-activation ResNet for ImageNet.

References:
    He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1: the stages.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.add import Add
from qlib.models.cifar import conv3x3
from qlib.models.imagenet import imagenet_spec
from qlib.models.spec import ModelSpec


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class PreactBlock(nn.Module):
    """What both kinds of block share: batch-norm and ReLU at the start, and a shortcut around what `residual` computes.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input. The first block of a network is
    given an input that is activated already.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, preactivate: bool) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.pre_bn = nn.BatchNorm2d(in_channels) if preactivate else None
        self.pre_relu = nn.ReLU() if preactivate else None
        self.residual_eltwiseadd = Add()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(_conv1x1(in_channels, out_channels, stride))

    def residual(self, x: Tensor) -> Tensor:
        """The path with the convolutions."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels * expansion, H / stride, W / stride)."""
        active: Tensor = x if self.pre_bn is None or self.pre_relu is None else self.pre_relu(self.pre_bn(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        out: Tensor = self.residual_eltwiseadd(self.residual(active), shortcut)
        return out


class PreactBasic(PreactBlock):
    """Two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, preactivate: bool) -> None:
        super().__init__(in_channels, channels, stride, preactivate)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)

    def residual(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(x))))
        return out


class PreactBottleneck(PreactBlock):
    """A 3x3 convolution between two 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, preactivate: bool) -> None:
        super().__init__(in_channels, channels, stride, preactivate)
        self.conv1 = _conv1x1(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU()
        self.conv3 = _conv1x1(channels, channels * self.expansion)

    def residual(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 4 * channels, H / stride, W / stride)."""
        x = self.conv2(self.relu2(self.bn2(self.conv1(x))))
        out: Tensor = self.conv3(self.relu3(self.bn3(x)))
        return out


# depth -> kind of block, and how many of them in each of the four stages
_DEPTHS: dict[int, tuple[type[PreactBlock], tuple[int, int, int, int]]] = {
    18: (PreactBasic, (2, 2, 2, 2)),
    34: (PreactBasic, (3, 4, 6, 3)),
    50: (PreactBottleneck, (3, 4, 6, 3)),
    101: (PreactBottleneck, (3, 4, 23, 3)),
    152: (PreactBottleneck, (3, 8, 36, 3)),
}


class PreactResNet(nn.Module):
    """Four stages of blocks, between a first convolution and a linear classifier."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        kind, (first, second, third, fourth) = _DEPTHS[depth]
        wider = kind.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(kind, 64, 64, first, stride=1)
        self.layer2 = _stage(kind, 64 * wider, 128, second, stride=2)
        self.layer3 = _stage(kind, 128 * wider, 256, third, stride=2)
        self.layer4 = _stage(kind, 256 * wider, 512, fourth, stride=2)
        self.final_bn = nn.BatchNorm2d(512 * wider)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * wider, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        x = self.maxpool(self.relu1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(self.final_relu(self.final_bn(x)))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out


def _stage(kind: type[PreactBlock], in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = kind(in_channels, channels, stride, preactivate=stride != 1)
    others = (kind(channels * kind.expansion, channels, 1, preactivate=True) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


def model_spec(arch: str) -> ModelSpec:
    """The spec of `preact_resnet<depth>`."""
    (depth,) = re.findall(r"\d+", arch)
    return imagenet_spec(arch, partial(PreactResNet, int(depth)))
