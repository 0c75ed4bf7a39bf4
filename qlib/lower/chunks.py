"""Elementwise work in pieces that stay in the cache: several passes over a tensor then cost one over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["chunks", "dense", "image_chunks", "laid_out_as"]

_ELEMENTS = 2**15
"""Of one thread: with a handful of temporaries of as many, it fits the second-level cache of any CPU."""


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose elements lie in memory without gaps."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """`x`, or a copy of it whose elements lie in the order of those of `like`, which is dense."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of dense tensors of one layout, piece by piece, as 1-dimensional views.

    On a GPU one piece is all: its passes are launches, which cost more than memory.

    >>> x, y = torch.ones(200_000), torch.zeros(200_000)
    >>> for a, b in chunks(x, y):
    ...     _ = b.add_(a)
    >>> y.sum().item()
    200000.0
    """
    flat = [tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()) for tensor in tensors]
    yield from zip(*(torch.split(each, _size(tensors[0])) for each in flat), strict=True)


def image_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As `chunks`, but a piece holds whole images of tensors ``[N, ...]``, as ``[images, elements of an image]``.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> [part.amax(1).tolist() for (part,) in image_chunks(x)]
    [[2.0, 5.0]]
    """
    shape = len(tensors[0]), tensors[0][:1].numel()
    rows = [tensor.as_strided(shape, (shape[1], 1), tensor.storage_offset()) for tensor in tensors]
    yield from zip(*(torch.split(each, max(_size(tensors[0]) // max(shape[1], 1), 1)) for each in rows), strict=True)


def _size(tensor: Tensor) -> int:
    """The most elements of a piece."""
    return _ELEMENTS * torch.get_num_threads() if tensor.device.type == "cpu" else max(tensor.numel(), 1)
