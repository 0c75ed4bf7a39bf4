"""AlexNet with batch-norm in place of local normalization and dropout, as low-bit training knows it.

References:
    Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS 2012.
    Zhou et al., DoReFa-Net, 2016: the batch-norms, and that the first convolution has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.models.imagenet import imagenet_spec
from qlib.models.spec import ModelSpec


class AlexNetBn(nn.Module):
    """Five convolutions, of which three are in two groups, and three linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 12, stride=4),
            nn.ReLU(),
            nn.Conv2d(96, 256, 5, padding=2, groups=2, bias=False),
            _norm2d(256),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(256, 384, 3, padding=1, bias=False),
            _norm2d(384),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1, groups=2, bias=False),
            _norm2d(384),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1, groups=2, bias=False),
            _norm2d(256),
            nn.MaxPool2d(3, stride=2),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096, bias=False),
            _norm1d(4096),
            nn.ReLU(),
            nn.Linear(4096, 4096, bias=False),
            _norm1d(4096),
            nn.ReLU(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> (N, num_classes)."""
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


def _norm2d(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-4, momentum=0.9)


def _norm1d(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-4, momentum=0.9)


def model_spec(arch: str) -> ModelSpec:
    """The spec of `alexnet_bn`."""
    return imagenet_spec(arch, AlexNetBn)
