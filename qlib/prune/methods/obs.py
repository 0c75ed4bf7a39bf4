"""OBS: what removing a weight costs when the other weights of its row make up for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlib.prune.methods._base import PRUNERS, Seen

__all__ = ["damped_inverse", "obs", "removal_losses"]

DAMPING = 1e-3
"""Added to the diagonal of the second moments, as a share of its mean."""

_WORK = 2e10
"""Most values of inverse matrices that all removals of a layer may change: wider rows are taken in parts."""

_SHRINK = 0.8
"""The share of weights that are left when the matrices are cut to those."""

_MEMORY = 2**28
"""Bytes of the inverse matrices of the rows that are done together."""


@PRUNERS.register("obs", order=40, scope="global", images=True)
@torch.no_grad()
def obs(weight: Tensor, seen: Seen) -> Tensor:
    """The error ``|W x - W' x|^2`` of a row that its removal adds, in each row the cheapest first.

    After each removal the other weights are those of least error. So that errors can be compared from layer to layer,
    they are multiplied by what the row's output does to the logits; where that is not known, they are shares of the
    layer's ``|W x|^2``. Shares can be compared from layer to layer. A wide
    row is taken in parts: of the inputs outside of a part, all are there to make up for it.

    References: Frantar and Alistarh, "Optimal brain compression", 2022, section 4; Hassibi and Stork, "Second order
    derivatives for network pruning: optimal brain surgeon", 1993.
    """

    inverse, inputs = damped_inverse(seen.moments), weight.shape[1]
    width = min(inputs, max(1, int(math.sqrt(_WORK / weight.numel()))))
    group = torch.arange(inputs) if seen.group is None else seen.group
    together = int(group.bincount().max())
    width = max(together, width - width % together)
    order = torch.argsort(group, stable=True) if width < inputs else torch.arange(inputs)
    losses = torch.empty(weight.shape, dtype=torch.float64)
    for part in torch.split(order, width):
        losses[:, part] = removal_losses(weight[:, part], inverse[part][:, part], group[part], seen.most or 1)
    if seen.importance is not None:
        return losses * seen.importance.double()[:, None]
    energy = torch.einsum("oi,ij,oj->", weight.double(), seen.moments, weight.double())
    return losses / energy.clamp_min(torch.finfo(torch.float64).tiny)


def removal_losses(weight: Tensor, inverse: Tensor, group: Tensor, most: int) -> Tensor:
    """For each weight of ``[out, in]`` the loss ``w_p^2 / inverse_pp`` at which it goes, from all weights to none.

    ``w -= inverse_:p w_p / inverse_pp`` and ``inverse -= inverse_:p inverse_p: / inverse_pp`` after each removal. Where
    `most` of a row's weights of one ``group [in]`` are gone, the rest of them stay, at an infinite loss. Law: in a row,
    each costs more than those that went before it.

    Two inputs that are nearly equal: one weight goes for nothing, as the other takes its part; then that one is dear.

    >>> inverse = torch.linalg.inv(torch.tensor([[1.0, 0.999], [0.999, 1.0]]).double())
    >>> removal_losses(torch.tensor([[1.0, 2.0]]), inverse, torch.tensor([0, 1]), 1).round(decimals=1)
    tensor([[0., 9.]], dtype=torch.float64)
    """
    rows = max(1, _MEMORY // (4 * inverse.numel()))
    _, group = torch.unique(group, return_inverse=True)
    return torch.cat([_losses_of_rows(part, inverse, group, most) for part in torch.split(weight, rows)]).double()


def _losses_of_rows(weight: Tensor, inverse: Tensor, group: Tensor, most: int) -> Tensor:
    left, (count, inputs) = weight.float().clone(), weight.shape
    inverses = inverse.float().expand(count, -1, -1).clone()
    place = torch.arange(inputs).expand(count, -1)
    losses = torch.full_like(left, math.inf)
    alive, gone = torch.ones_like(left, dtype=torch.bool), torch.zeros(count, int(group.max()) + 1, dtype=torch.int64)
    row, last = torch.arange(count), torch.zeros(count)
    total = int(group.bincount().clamp_max(most).sum())
    for done in range(1, total + 1):
        diagonal = inverses.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny)
        full = (gone >= most).gather(1, group[place])
        loss, chosen = (left.square() / diagonal).masked_fill(~alive | full, math.inf).min(1)
        last = torch.maximum(last * (1 + 1e-6), loss)  # without the first, this one would not be so cheap
        losses[row, place[row, chosen]] = last
        gone[row, group[place[row, chosen]]] += 1
        scale = diagonal[row, chosen].sqrt()[:, None]
        column = inverses[row, :, chosen] / scale
        left -= column * left[row, chosen][:, None] / scale
        inverses.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1)
        alive[row, chosen] = False
        if 0 < inputs - done <= _SHRINK * left.shape[1]:
            kept = alive.nonzero()[:, 1].view(count, inputs - done)
            left, place, alive = (each.gather(1, kept) for each in (left, place, alive))
            wide = inverses.gather(1, kept[:, :, None].expand(-1, -1, inverses.shape[2]))
            inverses = wide.gather(2, kept[:, None, :].expand(-1, kept.shape[1], -1))
    return losses


def damped_inverse(moments: Tensor) -> Tensor:
    """The inverse of the damped second moments; an input that is always 0 stands alone."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
