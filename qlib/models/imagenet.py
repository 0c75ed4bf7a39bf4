"""What the ImageNet families written here share."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qlib.models.spec import ModelSpec
from qlib.models.transforms import evaluation_transform, standard_classes, standard_input_shape


def imagenet_spec(arch: str, build: Callable[[int], nn.Module]) -> ModelSpec:
    """The spec of a model for ImageNet that has no published weights."""
    dataset = "imagenet"
    transform = evaluation_transform(dataset)
    return ModelSpec(arch, dataset, standard_classes(dataset), standard_input_shape(dataset), transform, build)
