"""VGG for CIFAR-10: the published convolutions, and one linear layer.

References:
    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, table 1.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from qlib.models.cifar import small_image_spec
from qlib.models.spec import ModelSpec

_CHANNELS = (64, 128, 256, 512, 512)
# depth -> convolutions in each of the five stages
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VggCifar(nn.Module):
    """Five stages, each ended by a max-pool, and a linear classifier."""

    def __init__(self, depth: int, batch_norm: bool, num_classes: int) -> None:
        super().__init__()
        self.features = _features(depth, batch_norm)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, num_classes)."""
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


def _features(depth: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    last = 3
    for channels, convolutions in zip(_CHANNELS, _CONVOLUTIONS[depth], strict=True):
        for _ in range(convolutions):
            norm = [nn.BatchNorm2d(channels)] if batch_norm else []
            layers += [nn.Conv2d(last, channels, 3, padding=1), *norm, nn.ReLU()]
            last = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def model_spec(arch: str) -> ModelSpec:
    """The spec of `vgg<depth>[_bn]_cifar`."""
    (depth,) = re.findall(r"\d+", arch)
    return small_image_spec(arch, "cifar10", partial(VggCifar, int(depth), "_bn_" in arch))
