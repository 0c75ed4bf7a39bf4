"""Elementwise work in pieces that stay in the cache: several passes over a tensor then cost one over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["chunks", "dense", "laid_out_as"]

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
    first = tensors[0]
    size = _ELEMENTS * torch.get_num_threads() if first.device.type == "cpu" else max(first.numel(), 1)
    flat = [tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()) for tensor in tensors]
    yield from zip(*(torch.split(each, size) for each in flat), strict=True)
