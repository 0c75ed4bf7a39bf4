"""Progress over the batches of a dataset: a bar on a terminal, plain lines in the log and in a pipe."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

__all__ = ["FILE_ONLY", "TimeUp", "progress_line", "time_limit", "track"]

#: `extra` of a record that goes to the log file, not to the console.
FILE_ONLY = {"file_only": True}

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


_deadline = math.inf  #: by the monotonic clock


class TimeUp(Exception):
    """The time that a `time_limit` gives is over."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp from the first `track` in the block that goes on for longer, and never between two of its steps.

    >>> with time_limit(0.0):
    ...     list(track([1], total_images=1, batch_size=1, description="Test", print_freq=1, count=int))
    Traceback (most recent call last):
    qlib.progress.TimeUp
    """
    global _deadline
    before = _deadline
    _deadline = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline = before


def _nothing() -> Mapping[str, float]:
    return {}


def _images_and_labels(batch: object) -> int:
    assert isinstance(batch, (tuple, list)), "pass `count` for batches that are not (images, labels)"
    return len(batch[0])


def progress_line(description: str, step: int, steps: int, fields: Mapping[str, float]) -> str:
    """One plain line: the step and the fields, with four spaces after each.

    >>> progress_line("Test", 10, 40, {"Loss": 0.5, "Top1": 92.0})
    'Test: [   10/   40]    Loss 0.500000    Top1 92.000000    '
    >>> progress_line("Calibration", 3, 4, {"Images": 12800})
    'Calibration: [    3/    4]    Images 12,800    '
    >>> progress_line("Epoch: [3]", 10, 40, {"LR": 0.1})
    'Epoch: [3][   10/   40]    LR 0.100000    '
    """
    parts = [f"{description}{'' if description.endswith(']') else ': '}[{step:5d}/{steps:5d}]"]
    parts += [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.6f}" for name, value in fields.items()
    ]
    return "".join(f"{part}    " for part in parts)


def track(
    batches: Iterable[_T],
    *,
    total_images: int,
    batch_size: int,
    description: str,
    print_freq: int,
    fields: Callable[[], Mapping[str, float]] = _nothing,
    count: Callable[[_T], int] = _images_and_labels,
    images_done: int = 0,
    unit: str = "images",
) -> Iterator[_T]:
    """Yields the batches and shows how far the loop over them has come.

    On a terminal there is a bar with images per second and the time left, and the plain lines go to the log file
    only. Elsewhere the lines are shown, one each `print_freq` steps, and no bar.

    Args:
        batches: (images, labels) pairs, or anything whose number of images `count` tells.
        total_images: images in all, those of `images_done` among them.
        batch_size: images of a full batch; tells the number of steps.
        description: begins each line, such as `Test`.
        print_freq: steps between two lines.
        fields: the numbers to show, called only when they are shown: once each `print_freq` steps.
        images_done: images that an earlier, interrupted run has done.
        unit: what is counted, where it is not images.
    """
    steps, done_before = -(-total_images // batch_size), -(-images_done // batch_size)
    extra = FILE_ONLY if sys.stderr.isatty() and sys.stdout.isatty() else None
    bar = tqdm(
        total=total_images,
        initial=images_done,
        desc=description,
        unit=f" {unit}",
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for step, batch in enumerate(batches, done_before + 1):
            if time.monotonic() >= _deadline:
                raise TimeUp
            yield batch
            if step % print_freq == 0:
                shown = fields()
                bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
                _log.info(progress_line(description, step, steps, shown), extra=extra)
            bar.update(count(batch))
