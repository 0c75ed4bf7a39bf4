"""Union-find over the coordinates of a graph, and tensors that hold one for each element of an activation."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["PINNED", "Unions", "collapse", "count_roots", "narrowed", "varying"]

PINNED = 0
"""The coordinate of what cannot be removed."""


def narrowed(labels: Tensor) -> Tensor:
    """The labels with one position for each axis along which memory repeats: it has all the labels there are."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def collapse(labels: Tensor) -> Tensor:
    """The same labels, in memory that repeats along each axis along which they do not vary.

    >>> collapse(torch.tensor([[1, 2], [1, 2]])).stride()
    (0, 1)
    """
    few = narrowed(labels)
    for axis in range(few.ndim):
        if few.shape[axis] > 1 and bool((few == few.narrow(axis, 0, 1)).all()):
            few = few.narrow(axis, 0, 1)
    return few.expand(labels.shape)


def varying(labels: Tensor) -> list[int]:
    """The axes along which collapsed labels vary."""
    return [axis for axis in range(labels.ndim) if labels.shape[axis] > 1 and labels.stride(axis) != 0]


class Unions:
    """A union-find: pairs are collected, and joined when someone asks for roots.

    Law: the root of a set is its smallest member, so what is united with `PINNED` has the root `PINNED`.

    >>> unions = Unions()
    >>> a, b = unions.fresh(3), unions.fresh(3)
    >>> unions.unite(a, b)
    >>> unions.unite(b[:1], b[1:2])
    >>> unions.roots(b)
    tensor([1, 1, 3])
    """

    def __init__(self) -> None:
        self._roots = torch.zeros(1, dtype=torch.int64)
        self._pairs: list[Tensor] = []

    def fresh(self, number: int) -> Tensor:
        """New members."""
        start = len(self._roots)
        made = torch.arange(start, start + number)
        self._roots = torch.cat([self._roots, made])
        return made

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Joins the members at the same places of two tensors, which broadcast."""
        a, b = torch.broadcast_tensors(narrowed(a), narrowed(b))  # type: ignore[no-untyped-call]
        a, b = self._roots[a], self._roots[b]
        differ = a != b
        pairs = torch.stack([a[differ], b[differ]])
        if pairs.numel():
            self._pairs.append(torch.unique(pairs, dim=1) if pairs.shape[1] < 1000 else _unique(pairs))

    def pin(self, labels: Tensor) -> None:
        """Joins members with what cannot be removed."""
        self.unite(labels, torch.tensor(PINNED))

    def roots(self, labels: Tensor) -> Tensor:
        """The roots of members, collapsed."""
        self._join()
        few = narrowed(labels)
        return collapse(self._roots[few].expand(labels.shape))

    def _join(self) -> None:
        if not self._pairs:
            return
        members, pairs = torch.unique(self._roots[torch.cat(self._pairs, 1)], return_inverse=True)
        self._pairs = []
        self._roots[members] = members[_smallest(pairs, len(members))]
        self._roots = self._roots[self._roots]


def _unique(pairs: Tensor) -> Tensor:
    """Each pair once; as single numbers they sort faster than as columns."""
    width = int(pairs.max()) + 1
    keys = torch.unique(pairs[0] * width + pairs[1])
    return torch.stack([keys // width, keys % width])


def _smallest(pairs: Tensor, number: int) -> Tensor:
    """For each of `number` vertices the smallest one of its component."""
    ends = pairs.numpy()
    graph = coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(number, number))
    _, components = connected_components(graph, directed=False)
    _, first = np.unique(components, return_index=True)
    return torch.from_numpy(first[components].astype(np.int64))


def count_roots(labels: Tensor, axis: int) -> int:
    """How many sets that can be removed are left where all labels of each position of `axis` are one set.

    >>> count_roots(torch.tensor([[1, 2], [3, 4]]), 0), count_roots(torch.tensor([[1, 2], [2, 3]]), 0)
    (2, 1)
    """
    rows = narrowed(labels).movedim(axis, 0).flatten(1)
    members, places = torch.unique(rows, return_inverse=True)
    pairs = torch.stack([places[:, :1].expand_as(places), places]).flatten(1)
    roots = members[_smallest(pairs, len(members))]
    return int((torch.unique(roots) != PINNED).sum())
