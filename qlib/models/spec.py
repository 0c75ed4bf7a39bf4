"""What a model family tells about one of its models, before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

Transform = Callable[["Image"], "Tensor"]
StateDict = dict[str, "Tensor"]


@dataclass(frozen=True)
class ModelSpec:
    """A model by name: how it is built, and the images that it was made for.

    Laws: `build(num_classes)` gives a new model each time, with random weights; `transform` turns any RGB image into a
    tensor of `input_shape` (channels, height, width), as evaluation needs it; `weights()`, where there are any, gives
    the state dict of the pretrained model, which has `num_classes` classes. `train_transform` is that of a model which
    brings its own.
    """

    arch: str
    dataset: str
    num_classes: int
    input_shape: tuple[int, int, int]
    transform: Transform
    build: Callable[[int], nn.Module]
    weights: Callable[[], StateDict] | None = None
    train_transform: Transform | None = None
