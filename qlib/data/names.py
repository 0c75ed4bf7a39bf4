"""The datasets by name."""

from __future__ import annotations

# `imagefolder` is any folder with train/ and val/; the others have a known number of classes.
DATASETS = ("imagenet", "imagefolder", "cifar10", "cifar100", "mnist", "fashion-mnist", "digits")


def infer_dataset(arch: str) -> str:
    """The dataset that a model's name implies.

    >>> [infer_dataset(arch) for arch in ("resnet20_cifar", "simplenet_mnist", "digits_cnn", "resnet18")]
    ['cifar10', 'mnist', 'digits', 'imagenet']
    """
    implied = {"cifar": "cifar10", "mnist": "mnist", "digits": "digits"}
    return next((dataset for part, dataset in implied.items() if part in arch.lower()), "imagenet")
