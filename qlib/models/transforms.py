"""What turns an RGB image of any size into a normalized tensor (channels, height, width), to evaluate and to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from qlib.errors import ModelError
from qlib.models.spec import ModelSpec, Transform
from qlib.users_code import users_code

# dataset -> (input shape, mean, std, shorter side before the crop)
_STANDARD: dict[str, tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...], int]] = {
    "imagenet": ((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256),
    "cifar": ((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32),
    "mnist": ((1, 28, 28), (0.1307,), (0.3081,), 28),
    "digits": ((1, 8, 8), (0.3053,), (0.3760,), 8),
}
# dataset -> (whose images its are like, classes)
_DATASETS = {
    "imagenet": ("imagenet", 1000),
    "imagefolder": ("imagenet", 1000),
    "cifar10": ("cifar", 10),
    "cifar100": ("cifar", 100),
    "mnist": ("mnist", 10),
    "fashion-mnist": ("mnist", 10),
    "digits": ("digits", 10),
}


@dataclass(frozen=True)
class UsersTransform:
    """A transform of a user's own, held to what a `ModelSpec` promises; `what` names it in errors."""

    function: Callable[[Image.Image], Any]
    what: str
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return str(self.function)

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor of an image. Raises ModelError where it fails, or is no finite float32 tensor of `shape`."""
        with users_code(f"{self.what} fails", function=self.function):
            value = self.function(image)
        if not isinstance(value, Tensor):
            raise ModelError(f"{self.what} returns {type(value).__name__!r}; make it return a tensor")
        if value.dtype != torch.float32:
            raise ModelError(f"{self.what} returns a tensor of {value.dtype}; make it float32, as by .float()")
        if value.shape != self.shape:
            raise ModelError(
                f"{self.what} returns a tensor of {_sizes(value.shape)}, and the model has input_shape ="
                f" {self.shape}; make them agree"
            )
        if not torch.isfinite(value).all():
            raise ModelError(f"{self.what} returns NaN or infinity; make it return finite numbers")
        return value.detach().as_subclass(Tensor)


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "no axes"


def known_datasets() -> tuple[str, ...]:
    """The datasets that have a transform here."""
    return tuple(_DATASETS)


def standard_classes(dataset: str) -> int:
    """The usual number of classes of a dataset.

    >>> standard_classes("cifar100")
    100
    """
    return _DATASETS[dataset][1]


def standard_input_shape(dataset: str) -> tuple[int, int, int]:
    """The usual (channels, height, width) of a dataset.

    >>> standard_input_shape("cifar100")
    (3, 32, 32)
    """
    return _STANDARD[_DATASETS[dataset][0]][0]


def evaluation_transform(dataset: str, input_shape: tuple[int, int, int] | None = None) -> Transform:
    """Resize, central crop and normalization of `dataset`, for images of `input_shape` if that differs from the usual.

    An image that has the right size already keeps its pixels. One channel means gray.

    >>> from PIL import Image
    >>> evaluation_transform("cifar10")(Image.new("RGB", (32, 32), (255, 0, 0)))[:, 0, 0]
    tensor([ 1., -1., -1.])
    """
    shape, mean, std, side = _STANDARD[_DATASETS[dataset][0]]
    channels, height, width = input_shape or shape
    side = round(side * max(height, width) / shape[1])
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    gray = [T.Grayscale()] if channels == 1 else []
    steps = [*gray, T.Resize(side), T.CenterCrop((height, width)), T.ToTensor(), T.Normalize(mean, std)]
    return cast(Transform, T.Compose(steps))


def training_transform(spec: ModelSpec, dataset: str) -> Transform:
    """What training sees of an image of `dataset`: a random crop of it, mirrored half of the time where that is usual.

    cifar: 4 black pixels around it, then a crop of the model's size; imagenet: a part of 8 to 100 % of the area;
    mnist and digits: as for evaluation. The normalization is that of the model's evaluation transform. Random numbers
    are those of torch. A model with a `train_transform` of its own keeps that.

    Raises ModelError where the evaluation transform is the user's own, so that its normalization is not known.
    """
    if spec.train_transform is not None:
        return spec.train_transform
    family = _DATASETS[dataset][0]
    if family in ("mnist", "digits"):
        return spec.transform
    channels, height, width = spec.input_shape
    crops: list[Callable[[Any], Any]]
    if family == "cifar":
        crops = [T.Resize(min(height, width)), T.RandomCrop((height, width), padding=4)]
    else:
        crops = [T.RandomResizedCrop((height, width))]
    gray = [T.Grayscale()] if channels == 1 else []
    steps = [*gray, *crops, T.RandomHorizontalFlip(), T.ToTensor(), _normalization(spec)]
    return cast(Transform, T.Compose(steps))


def _normalization(spec: ModelSpec) -> T.Normalize:
    known = normalization(spec)
    if known is None:
        raise ModelError(
            f"{spec.arch!r} has a transform of its own, so how to train it is not known; give the model an attribute"
            " train_transform, a function of an RGB image as well"
        )
    return T.Normalize(*known)


def normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel in the evaluation transform; None where it is the user's own.

    Ours have it as their last step; torchvision's tell it.

    >>> from qlib.models import find_model
    >>> normalization(find_model("simplenet_cifar"))
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    transform: Any = spec.transform.function if isinstance(spec.transform, UsersTransform) else spec.transform
    last = transform.transforms[-1] if isinstance(transform, T.Compose) else transform
    if not hasattr(last, "mean") or not hasattr(last, "std"):
        return None
    return tuple(last.mean), tuple(last.std)
