"""Batches of a dataset in a fixed order, read by worker processes or in this one."""

from __future__ import annotations

import math
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlib.data.datasets import ImageDataset
from qlib.errors import DataError, ModelError, QlibError, SystemRefusal
from qlib.system import in_words

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Unreadable:
    """What a worker reports of a damaged image: an exception would lose its one sentence on the way."""

    path: str
    sentence: str


_Item = tuple[Any, int] | _Unreadable | QlibError


@dataclass(frozen=True, eq=False)
class _Reader:
    dataset: ImageDataset

    def __getitem__(self, index: int) -> _Item:
        try:
            return self.dataset[index]
        except DataError as error:
            return _Unreadable(self.dataset.path(index), str(error))
        except (ModelError, SystemRefusal) as error:  # its cause need not survive the way out of a worker
            return type(error)(str(error))


def _collate(items: list[_Item]) -> tuple[Any, Any, list[_Unreadable], QlibError | None]:
    import torch

    good = [item for item in items if isinstance(item, tuple)]
    bad = [item for item in items if isinstance(item, _Unreadable)]
    failed = next((item for item in items if isinstance(item, QlibError)), None)
    images = torch.utils.data.default_collate([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good]), bad, failed


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _need_queues() -> None:
    """Raises SystemRefusal where there are no queues between processes: torch would stop half-way, with a traceback."""
    try:
        multiprocessing.Queue()
    except OSError as error:
        raise SystemRefusal(
            f"the processes that read images cannot be started ({in_words(error)}); give -j 0, or room in /dev/shm"
        ) from error


@dataclass(frozen=True, eq=False)
class Loader:
    """An iterable of (images, labels): float (N, C, H, W) and int64 (N,).

    Laws: each pass gives the same batches in the order of `indices`, for any number of `workers` (0: this process);
    torch's global random state is left alone; `skipped` holds the paths of the images left out in the last pass.
    """

    dataset: ImageDataset
    batch_size: int
    workers: int
    indices: Sequence[int]
    skip_corrupt: bool
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of batches."""
        return math.ceil(len(self.indices) / self.batch_size)

    @property
    def total_images(self) -> int:
        """The number of images in a pass, damaged ones included."""
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches.

        Raises:
            DataError: an image is damaged, unless `skip_corrupt`; or all are.
            ModelError: the transform, a user's own, fails.
        """
        self.skipped.clear()
        for images, labels, unreadable, failed in self._batches():
            if failed is not None:
                raise failed
            if unreadable and not self.skip_corrupt:
                raise DataError(unreadable[0].sentence)
            self.skipped.extend(item.path for item in unreadable)
            if images is not None:
                yield images, labels
        if len(self.skipped) == len(self.indices):
            raise DataError(
                f"all {len(self.skipped)} images are damaged, the first is {self.skipped[0]!r}; replace them"
            )

    def _batches(self) -> Iterator[tuple[Any, Any, list[_Unreadable], QlibError | None]]:
        import torch
        from torch.utils.data import DataLoader

        if self.workers:
            _need_queues()
        with warnings.catch_warnings():  # more workers than cores do no harm to a pass over the images
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            batches: DataLoader[Any] = DataLoader(
                _Reader(self.dataset),  # type: ignore[arg-type]  # torch asks for its own base class, needs only []
                batch_size=self.batch_size,
                sampler=self.indices,
                num_workers=self.workers,
                collate_fn=_collate,
                worker_init_fn=_leave_interrupts_to_the_parent,
                generator=torch.Generator(),
                pin_memory=torch.cuda.is_available(),
            )
            return iter(batches)


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    skip_corrupt: bool = False,
) -> Loader:
    """A loader of the images at `indices` (all, if None), in that order.

    >>> import numpy, torch
    >>> from qlib.data.datasets import ImageArray
    >>> images = ImageArray("zeros", numpy.zeros((3, 2, 2), numpy.uint8))
    >>> dataset = ImageDataset(images, [0, 1, 1], ["a", "b"], lambda image: torch.zeros(3, *image.size))
    >>> [(images.shape, labels) for images, labels in make_loader(dataset, batch_size=2, indices=[2, 0, 1])]
    [(torch.Size([2, 3, 2, 2]), tensor([1, 0])), (torch.Size([1, 3, 2, 2]), tensor([1]))]
    """
    order = range(len(dataset)) if indices is None else indices
    assert len(order) > 0
    return Loader(dataset, batch_size, workers, order, skip_corrupt)
