"""The ResNeXt of 101 layers with 32 groups of 4 channels, which torchvision does not name.

References:
    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, table 1 and section 5.1.
"""

from __future__ import annotations

from torchvision.models.resnet import Bottleneck, ResNet

from qlib.models.imagenet import imagenet_spec
from qlib.models.spec import ModelSpec

_BLOCKS = [3, 4, 23, 3]


def _build(num_classes: int) -> ResNet:
    return ResNet(Bottleneck, _BLOCKS, num_classes=num_classes, groups=32, width_per_group=4)


def model_spec(arch: str) -> ModelSpec:
    """The spec of `resnext101_32x4d`, whose layers are named as those of torchvision's `resnext101_32x8d`."""
    return imagenet_spec(arch, _build)
