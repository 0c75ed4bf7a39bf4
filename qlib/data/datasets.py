"""Datasets of labelled images: folders of image files, torchvision's files, and scikit-learn's digits.

All give their images to the transform as RGB, whatever they are stored as; a transform for gray ones gets the same gray
values back.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qlib.data.names import DATASETS
from qlib.data.pixels import rgb
from qlib.errors import DataError, ModelError, did_you_mean
from qlib.files import expanded
from qlib.system import shortage

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # not all that Pillow knows: it would run Ghostscript on EPS
_MAX_DEPTH = 50
_MOST_PIXELS, _PIXELS_A_BYTE = 16 * 2**20, 12

Split = Literal["train", "val", "test"]


class Images(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image in RGB; raises anything where it is damaged."""

    def name(self, index: int) -> str:
        """The image's path, or what comes nearest to one."""


@dataclass(frozen=True)
class ImageFiles:
    """Images in files."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """Opens and decodes the file."""
        with open(self.paths[index], "rb") as file:
            image = Image.open(file, formats=_FORMATS)
            _check_pixels(image, os.fstat(file.fileno()).st_size)
            return rgb(image)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]


def _check_pixels(image: Image.Image, size: int) -> None:
    """Raises ValueError for an image too large for a file of `size` bytes, before any memory is taken for it."""
    if image.width * image.height > max(_MOST_PIXELS, _PIXELS_A_BYTE * size):
        pixels = f"{image.width:,} x {image.height:,} pixels"
        raise ValueError(f"it has {pixels} in {size:,} bytes, which fills the memory: make it smaller")


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Images in memory: bytes of shape (images, height, width) or (images, height, width, 3)."""

    title: str
    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        """A copy of the image."""
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def name(self, index: int) -> str:
        """The dataset's name and the index."""
        return f"{self.title}[{index}]"


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A map-style dataset for torch: `dataset[i]` is (transformed image, label).

    Law: item i is the same image on each run; its label is an index into `classes`.
    """

    images: Images
    labels: Sequence[int]
    classes: list[str]
    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image and its label.

        Raises:
            DataError: the image cannot be decoded.
            ModelError: the transform, a user's own, fails.
            SystemRefusal: too little memory, or too many open files: no fault of the image.
        """
        try:
            image = self.images.read(index)
        except Exception as error:  # decoders raise anything for a file that is truncated, damaged or no image
            if refused := shortage(error):
                raise refused from error
            if _is_mistake(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"cannot read image {self.path(index)!r}, number {index + 1:,} of {len(self):,} ({reason}); "
                "replace or delete it, or leave such images out with --skip-corrupt"
            ) from error
        try:
            return self.transform(image), self.labels[index]
        except ModelError as error:
            raise ModelError(f"image {self.path(index)!r}: {error}") from error

    def path(self, index: int) -> str:
        """The file of image `index`, or for an image that has none the dataset's name and the index."""
        return self.images.name(index)


def _is_mistake(error: Exception) -> bool:
    """Whether an error is one in this package, and not what a decoder says of a file."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__package__") == __package__ and not isinstance(error, (OSError, ValueError))


def open_dataset(
    name: str,
    root: Path | None,
    split: Split,
    transform: Callable[[Image.Image], Any],
    *,
    num_classes: int | None,
) -> ImageDataset:
    """The `split` of a dataset; `val` and `test` are the same images.

    Any dataset may also be a folder with train/ and val/, which hold a folder for each class. `digits` needs no `root`.

    Raises:
        DataError: the name is unknown, `root` does not hold the dataset, it has no images, or it has other than
            `num_classes` classes (where that is given).

    >>> digits = open_dataset("digits", None, "val", lambda image: image.size, num_classes=10)
    >>> len(digits), digits[0], digits.path(0)
    (500, ((8, 8), 1), 'digits[0]')
    """
    name = name.lower().replace("_", "-")
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; allowed: {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}")
    if name == "digits" and root is None:
        images, labels, classes = _digits(split)
    elif root is None:
        raise DataError(f"dataset {name} needs its folder; give it as DATASET_DIR")
    else:
        images, labels, classes = _from_folder(name, expanded(root), split)
    if num_classes not in (None, len(classes)):
        where = f"dataset {name}" if root is None else f"{str(root)!r} ({name})"
        raise DataError(
            f"{where} has {len(classes)} classes and the model {num_classes}; "
            "give the data that the model was made for, a model with as many classes, or --dataset imagefolder to make "
            "the model with those of the folder"
        )
    return ImageDataset(images, labels, classes, transform)


_Parts = tuple[Images, Sequence[int], list[str]]


def _from_folder(name: str, root: Path, split: Split) -> _Parts:
    if not root.is_dir():
        raise DataError(f"there is no dataset folder {str(root)!r}; give the folder of {name} as DATASET_DIR")
    if (root / "train").is_dir() or (root / "val").is_dir() or name in ("imagenet", "imagefolder"):
        try:
            return _image_folder(root, split)
        except OSError as error:
            raise DataError(
                f"cannot read {str(error.filename)[:200]!r} ({error.strerror}); remove it, or make it readable"
            ) from error
    if name == "digits":
        raise DataError(f"{str(root)!r} has no train/ and val/; leave it out: the digits come with scikit-learn")
    return _torchvision(name, root, split)


def _image_folder(root: Path, split: Split) -> _Parts:
    folder = root / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise DataError(
            f"dataset folder {str(root)!r} has no {folder.name}/; it needs train/ and val/ with a folder for each class"
        )
    classes = _class_folders(folder)
    if not classes:
        raise DataError(f"{str(folder)!r} is empty; it needs a folder of images for each class")
    _check_same_classes(root, classes)
    samples = [(path, label) for label, name in enumerate(classes) for path in _image_paths(folder / name)]
    if not samples:
        kinds = " ".join(_EXTENSIONS)
        raise DataError(f"the {len(classes)} class folders in {str(folder)!r} hold no images; put some there ({kinds})")
    return ImageFiles([path for path, _ in samples]), [label for _, label in samples], classes


def _image_paths(folder: Path) -> list[str]:
    """The image files in a folder and those in it, in torchvision's order; a folder that links reach twice counts once.

    A link to a folder that holds this one is not followed.

    Raises:
        DataError: something with an image's name is no file, or the folders are nested too deep.
    """
    files: dict[str, list[str]] = {}
    seen = {_identity(str(parent)) for parent in folder.resolve().parents}
    waiting = [(str(folder), 0)]
    while waiting:
        path, depth = waiting.pop()
        identity = _identity(path)
        if identity in seen:
            continue
        seen.add(identity)
        if depth > _MAX_DEPTH:
            raise DataError(f"{path[:200]!r} and what follows lies more than {_MAX_DEPTH} folders deep; move it up")
        with os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
        waiting += [(entry.path, depth + 1) for entry in entries if entry.is_dir()]
        images = [entry for entry in reversed(entries) if entry.name.lower().endswith(_EXTENSIONS)]
        for entry in images:
            if not entry.is_file() and not entry.is_dir():
                raise DataError(f"{entry.path!r} has an image's name but is no file; remove it")
        files[path] = [entry.path for entry in images if entry.is_file()]
    return [path for _, paths in sorted(files.items()) for path in paths]


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _check_same_classes(root: Path, classes: list[str]) -> None:
    """A class that only one split has would silently shift the labels of the other."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            continue
        differ = sorted(set(classes) ^ set(_class_folders(root / split)))
        if differ:
            raise DataError(
                f"train/ and val/ of {str(root)!r} differ in {len(differ)} class folders "
                f"({', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}); make them agree, empty ones included"
            )


def _torchvision(name: str, root: Path, split: Split) -> _Parts:
    from torchvision import datasets

    kinds = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
    }
    try:
        data = kinds[name](str(root), train=split == "train", download=False)
        pixels, labels = np.asarray(data.data), [int(label) for label in data.targets]
        _check_files(pixels, labels, len(data.classes))
    except Exception as error:  # its readers raise anything for damaged files, also an AssertionError
        reason = f" ({error})" if isinstance(error, _Damaged) else ""
        raise DataError(
            f"{str(root)!r} does not hold {name}{reason}; put torchvision's files of it there, "
            "or train/ and val/ with a folder of images for each class"
        ) from error
    return ImageArray(name, pixels), labels, list(data.classes)


class _Damaged(Exception):
    """What files that could be read cannot mean."""


def _check_files(pixels: NDArray[Any], labels: Sequence[int], classes: int) -> None:
    if len(pixels) != len(labels) or not labels:
        raise _Damaged(f"its files have {len(pixels)} images and {len(labels)} labels")
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise _Damaged(f"its images are {pixels.dtype} of shape {pixels.shape}")
    if min(labels) < 0 or max(labels) >= classes:
        raise _Damaged(f"its labels are {min(labels)} to {max(labels)}, of {classes} classes")


def _digits(split: Split) -> _Parts:
    """1,797 scans of 8x8 pixels with 17 shades; 500 of them, 50 of each digit, are for evaluation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    held_out = np.concatenate([order[digits.target[order] == digit][:50] for digit in range(10)])
    chosen = np.isin(np.arange(len(digits.target)), held_out) == (split != "train")
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageArray("digits", pixels), digits.target[chosen].tolist(), [str(digit) for digit in range(10)]
