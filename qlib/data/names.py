"""The datasets by name."""

from __future__ import annotations

DATASETS = ("imagenet", "imagefolder", "cifar10", "cifar100", "mnist", "fashion-mnist", "digits")
"""`imagefolder` is any folder with train/ and val/; the others have a known number of classes."""
