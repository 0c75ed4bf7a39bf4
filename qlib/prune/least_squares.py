"""Least squares under masks: the weights that are left, so that a layer's output changes least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.stats.gram import columns

__all__ = ["LayerMoments", "solve_masked"]

DAMPING = 1e-3
"""Weight of ``|W - W0|^2``, as a share of the mean of the diagonal of the second moments."""

_EXACT = 2e11
"""Operations up to which rows are solved exactly; above it, by conjugate gradients."""

_STEPS = 64
_ROWS = 2**27  #: values of the matrices that are factorized together


class LayerMoments:
    """Central second moments of a layer's inputs x, and with the inputs y of the same layer in another model.

    ``own = sum (x - mean)(x - mean)^T / n`` and ``cross = sum (y - mean)(x - mean)^T / n``, ``[groups, in, in]`` in
    float64. What is added to all outputs is the bias's business: it takes the means.
    """

    def __init__(self) -> None:
        self._own: Tensor | float = 0.0
        self._cross: Tensor | float = 0.0
        self._sum: Tensor | float = 0.0
        self._other: Tensor | float = 0.0
        self._count = 0

    def add(self, module: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
        """Adds a batch of inputs; without `y`, only the own moments are known."""
        seen = columns(module, x)
        self._own += (seen.transpose(1, 2) @ seen).double()
        self._sum += seen.sum(1, dtype=torch.float64)
        if y is not None:
            other = columns(module, y)
            self._cross += (other.transpose(1, 2) @ seen).double()
            self._other += other.sum(1, dtype=torch.float64)
        self._count += seen.shape[1]

    @property
    def mean(self) -> Tensor:
        """The mean input ``[groups, in]``."""
        return self._sum / self._count  # type: ignore[return-value]

    @property
    def other_mean(self) -> Tensor:
        """The mean input in the other model."""
        return self._other / self._count  # type: ignore[return-value]

    @property
    def own(self) -> Tensor:
        return self._own / self._count - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def cross(self) -> Tensor:
        return self._cross / self._count - self.other_mean[:, :, None] * self.mean[:, None, :]


def solve_masked(weight: Tensor, own: Tensor, cross: Tensor, mask: Tensor) -> Tensor:
    """The weight ``[out, in]``, 0 where the mask is false, of least ``|W0 y - W x|^2 + damping |W - W0|^2``.

    ``own = x x^T`` and ``cross = y x^T``, both ``[in, in]``: x are the inputs of the pruned model, y those of the
    original. In each row: ``W_S = (W0 (cross + damping))_S inverse((own + damping)_SS)``, S what the mask keeps.

    References: Frantar and Alistarh, "Optimal brain compression", 2022; asymmetric as in He et al., "Channel pruning
    for accelerating very deep neural networks", 2017.

    The second input is twice the first: the weight of the first takes over.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()
    >>> solve_masked(torch.tensor([[1.0, 1.0]]), x, x, torch.tensor([[True, False]])).round(decimals=1)
    tensor([[3., 0.]])
    """
    damping = DAMPING * own.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    unit = torch.eye(len(own), dtype=own.dtype, device=own.device)
    left, right = own + damping * unit, weight.double() @ (cross + damping * unit)
    kept = mask.double()
    exact = weight.shape[0] * weight.shape[1] ** 3 / 3 < _EXACT
    return ((_cholesky if exact else _conjugate)(left, right * kept, kept) * kept).float()


def _cholesky(left: Tensor, right: Tensor, kept: Tensor) -> Tensor:
    """The rows of ``X left = right`` on their supports; what is not kept has a 1 on the diagonal of its matrix."""
    rows = max(1, _ROWS // left.numel())
    solved = []
    for part, support in zip(torch.split(right, rows), torch.split(kept, rows), strict=True):
        matrices = left * support[:, :, None] * support[:, None, :] + torch.diag_embed(1 - support)
        solved.append(torch.cholesky_solve(part[:, :, None], torch.linalg.cholesky(matrices))[:, :, 0])
    return torch.cat(solved)


def _conjugate(left: Tensor, right: Tensor, kept: Tensor) -> Tensor:
    """The same, all rows at once by conjugate gradients with the diagonal as preconditioner."""
    scale = left.diagonal().rsqrt()
    left, right = left * scale[:, None] * scale, right * scale
    solution = torch.zeros_like(right)
    residual = direction = right
    size = residual.square().sum(1, keepdim=True)
    for _ in range(_STEPS):
        image = direction @ left * kept
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        solution = solution + step * direction
        residual = residual - step * image
        size, before = residual.square().sum(1, keepdim=True), size
        direction = residual + size / before.clamp_min(torch.finfo(torch.float64).tiny) * direction
    return solution * scale
