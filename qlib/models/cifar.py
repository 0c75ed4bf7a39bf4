"""What the CIFAR families share."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qlib.models.spec import ModelSpec
from qlib.models.transforms import evaluation_transform, standard_input_shape


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (divided by `stride`), without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def small_image_spec(arch: str, dataset: str, build: Callable[[int], nn.Module]) -> ModelSpec:
    """The spec of a model for the images of `dataset`, in ten classes."""
    return ModelSpec(arch, dataset, 10, standard_input_shape(dataset), evaluation_transform(dataset), build)
