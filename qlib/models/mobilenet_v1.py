"""The first MobileNet, with all of its channels or a part of them.

References:
    Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017, table 1.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.imagenet import imagenet_spec
from qlib.models.spec import ModelSpec

# channels and stride of each depthwise-separable block
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """A convolution and thirteen depthwise-separable blocks, whose channels are multiplied by `width`.

    `model.0` is the first convolution with its batch-norm and ReLU, `model.1` to `model.13` are the blocks, and
    `model.14` is the pool.
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        last = int(32 * width)
        stages = [nn.Sequential(*_activated(nn.Conv2d(3, last, 3, stride=2, padding=1, bias=False)))]
        for full, stride in _BLOCKS:
            channels = int(full * width)
            stages.append(_block(last, channels, stride))
            last = channels
        self.model = nn.Sequential(*stages, nn.AvgPool2d(7))
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> (N, num_classes)."""
        out: Tensor = self.fc(torch.flatten(self.model(x), 1))
        return out


class MobileNetV1Dropout(nn.Module):
    """The same network with dropout before its classifier: `conv1`, `features.0` to `features.12`, `classifier.1`."""

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        plain = MobileNetV1(width, num_classes)
        first, *blocks, _ = plain.model
        self.conv1 = first
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), plain.fc)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes)."""
        out: Tensor = self.classifier(self.features(self.conv1(x)).mean((2, 3)))
        return out


def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across them."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
    pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(*_activated(depthwise), *_activated(pointwise))


def _activated(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()


def model_spec(arch: str) -> ModelSpec:
    """The spec of `mobilenet` or `mobilenet_v1_dropout`, or of those with `_<percent>` of their channels."""
    percent = re.fullmatch(r".*_(\d+)", arch)
    network = MobileNetV1Dropout if "dropout" in arch else MobileNetV1
    return imagenet_spec(arch, partial(network, int(percent[1]) / 100 if percent else 1.0))
