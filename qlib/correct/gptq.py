"""GPTQ: weights are rounded one input after the other, and the rest of the row makes up for each error."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._pairs import single_layers
from qlib.correct._stream import Buffer, Stream, track_nodes
from qlib.correct._write_back import write_back
from qlib.graph import Graph
from qlib.lower.fake import FakeLayer, FakeWeight, fake_quantize, lower_fake
from qlib.quant.plan import Plan
from qlib.stats.gram import columns

__all__ = ["gptq", "round_rows"]

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean."""

POSITIONS = 4
"""Of so many positions to each input follows what makes up for errors before a layer; of fewer, chance would."""

_PRECISION = 1e-5


@CORRECTIONS.register("gptq", order=10, choice="rounding", images=True)
@torch.no_grad()
def gptq(graph: Graph, plan: Plan, images: CalibrationImages) -> Plan:
    """Rounds the weights of convolutions and linear layers, layer after layer; those of `graph` are set to that.

    ``min |W x - W~ x_q|^2`` for the float model's inputs x, and the inputs x_q that the fake-quantized layers before it
    give: each layer makes up for the errors of those before. A bias takes the mean of the error away. Transposed
    convolutions are rounded to nearest.

    References: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers",
    2023, section 3; Li et al., "GPTAQ: efficient finetuning-free quantization for asymmetric calibration", 2025.
    """
    fake, single = lower_fake(graph, plan), {node.name for node in single_layers(graph)}
    with Buffer(images.folder) as buffer:
        batches = list(images.batches())
        floats, fakes = Stream(graph, batches, buffer), Stream(fake, batches, buffer)
        for node in track_nodes(fake, "GPTQ"):
            layer = fake.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, FakeLayer) and isinstance(layer.weight, FakeWeight):
                source = node.all_input_nodes[0]
                quantized = list(map(layer.inputs[0], fakes[source]))
                exact = floats[source] if node.name in single else quantized  # no call of several can make up for much
                _round_layer(layer, layer.weight, zip(exact, quantized, strict=True))
            for stream in (floats, fakes):
                stream.advance(node)
    return write_back(graph, fake, plan)


def _round_layer(layer: FakeLayer, rounding: FakeWeight, inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Rounds one layer for its inputs of each batch, in float and fake-quantized."""
    module = layer.module
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return
    groups = getattr(module, "groups", 1)
    rows = torch.unflatten(module.weight.detach().flatten(1), 0, (groups, -1)).double()  # [groups, out, in]
    moments = functools.reduce(operator.add, (_Moments.of(module, *each) for each in inputs))
    hessian, cross = moments.centered() if module.bias is not None else (moments.hessian, moments.cross)
    target = _target(rows, hessian, cross) if moments.count >= POSITIONS * rows.shape[2] else rows
    shape = (groups, rows.shape[1], 1)

    def per_row(values: Tensor) -> Tensor:
        return values.reshape(-1, 1).expand(len(module.weight), 1).reshape(shape)

    scale, low, high = (per_row(values) for values in (rounding.scale, rounding.low, rounding.high))
    each = zip(target, hessian, scale, low, high, rows == 0, strict=True)
    rounded = torch.stack([round_rows(*parts) for parts in each])
    module.weight.copy_(rounded.view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(module.bias.double() + (moments.means(rows) - moments.means_q(rounded.double())))


def _target(rows: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """Weights ``[groups, out, in]`` in float that make of x_q what `rows` make of x: ``W (C + d) (H + d)^-1``.

    >>> _target(torch.ones(1, 1, 1), torch.full((1, 1, 1), 4.0), torch.full((1, 1, 1), 5.0)).item()  # d is 0.04
    1.2475...
    """
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    damped = hessian + DAMPING * mean[:, None, None] * torch.eye(hessian.shape[1]).to(hessian)
    change: Tensor = torch.linalg.solve(damped, rows @ (cross - hessian), left=False)
    return rows + change


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over all positions of images, of the columns x in float and x_q ``[groups, in]``, in float64.

    `hessian` is ``sum x_q x_q^T``, `cross` ``sum x x_q^T``, `sums` and `sums_q` those of x and of x_q.
    """

    hessian: Tensor
    cross: Tensor
    sums: Tensor
    sums_q: Tensor
    count: int

    @classmethod
    def of(cls, module: nn.Module, exact: Tensor, fake: Tensor) -> _Moments:
        x, x_q = columns(module, exact), columns(module, fake)
        hessian, cross = ((each.mT @ x_q).double() for each in (x_q, x))
        return cls(hessian, cross, x.double().sum(1), x_q.double().sum(1), x.shape[1])

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def centered(self) -> tuple[Tensor, Tensor]:
        """`hessian` and `cross` of what is left of x and x_q when their means are taken away.

        Squares are summed in float32: what may be its rounding alone is added to the diagonal.
        """
        means = self.sums_q[:, None, :] / self.count
        unsure = torch.diag_embed(_PRECISION * self.hessian.diagonal(dim1=1, dim2=2))
        removed, crossed = (sums[:, :, None] * means - unsure for sums in (self.sums_q, self.sums))
        return self.hessian - removed, self.cross - crossed

    def means(self, rows: Tensor) -> Tensor:
        """The mean of each output ``[out]`` that weights ``[groups, out, in]`` make of x."""
        return torch.einsum("goi,gi->go", rows, self.sums).flatten() / self.count

    def means_q(self, rows: Tensor) -> Tensor:
        """That which they make of x_q."""
        return torch.einsum("goi,gi->go", rows, self.sums_q).flatten() / self.count


def round_rows(
    rows: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor, pruned: Tensor | None = None
) -> Tensor:
    """Rounded ``rows [out, in]`` that change ``rows @ x`` little for inputs with ``sum x x^T = hessian [in, in]``.

    In the order of falling diagonal of the Hessian, each column is rounded to ``clamp(round(w / s), low, high) * s``
    (s, low and high ``[out, 1]``), and its error e spread over the columns that are left:
    ``w_j -= e * U_ij / U_ii`` with U the Cholesky factor of the inverse Hessian.

    What is `pruned` (a mask; without one, what is 0) becomes 0, and what it was goes on to the others, as an error.

    Two inputs that are always equal: what rounding takes from one weight, the other gets.

    >>> ones = torch.ones(1, 1)
    >>> round_rows(torch.tensor([[0.4, 0.4]]), torch.ones(2, 2).double(), ones, -8 * ones, 7 * ones)
    tensor([[0., 1.]])
    """
    rows, hessian = rows.double(), hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal += DAMPING * diagonal.mean()
    pruned = (rows == 0 if pruned is None else pruned)[:, order]
    left, hessian = rows[:, order], hessian[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for i in range(left.shape[1]):
        column = left[:, i]
        code = fake_quantize(column[:, None].float(), scale, low, high)[:, 0].double()
        code[pruned[:, i]] = 0.0
        error = (column - code) / factor[i, i]
        left[:, i] = code
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    rounded = torch.empty_like(left)
    rounded[:, order] = left
    return rounded.float()
