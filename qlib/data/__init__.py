"""Images: `open_dataset` by name and folder, `make_loader` for batches, and parts of a dataset.

Importing this package imports neither torch nor torchvision.
"""

from qlib.data.augmented import AugmentedDataset, augmented
from qlib.data.datasets import ImageDataset, Split, open_dataset
from qlib.data.loader import Loader, make_loader
from qlib.data.names import DATASETS
from qlib.data.subset import choose_subset, epoch_order, split_train

__all__ = [
    "DATASETS",
    "AugmentedDataset",
    "ImageDataset",
    "Loader",
    "Split",
    "augmented",
    "choose_subset",
    "epoch_order",
    "make_loader",
    "open_dataset",
    "split_train",
]
